"""The thesis's baseline: MoCo-v2, trained as ``densecl_r50_c5_8xb32-200e_imagenet.py`` is."""

_base_ = './densecl_r50_c5_8xb32-200e_imagenet.py'

model = dict(dense_weight=0.0)
find_unused_parameters = True
