"""Coarse masks of COCO train2017 and unlabeled2017 with DenseCL's ResNet-50."""

_base_ = [
    './_base_/free-mask_r50.py',
    './_base_/unlabeled_coco.py',
    'mmdet::_base_/default_runtime.py',
]
