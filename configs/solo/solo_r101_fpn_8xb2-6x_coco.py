"""Tables 3.1, 3.6 and 3.7: SOLO, ResNet-101, 72 epochs."""

_base_ = './solo_r50_fpn_8xb2-6x_coco.py'

model = dict(
    backbone=dict(depth=101, init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet101'))
)
