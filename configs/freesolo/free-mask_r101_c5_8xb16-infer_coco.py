"""Coarse masks of COCO train2017 and unlabeled2017 with DenseCL's ResNet-101."""

_base_ = './free-mask_r50_c5_8xb16-infer_coco.py'

model = dict(backbone=dict(depth=101))

custom_hooks = [dict(type='FreeSOLOStoreHook', folder='work_dirs/free_mask_coco_r101/')]
