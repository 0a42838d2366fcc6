"""``densecl_r50_c5_8xb32-800e_coco.py`` with ResNet-101."""

_base_ = './densecl_r50_c5_8xb32-800e_coco.py'

model = dict(backbone=dict(depth=101))
