"""``densecl_r50_c5_8xb32-200e_imagenet.py`` with ResNet-101."""

_base_ = './densecl_r50_c5_8xb32-200e_imagenet.py'

model = dict(backbone=dict(depth=101))
