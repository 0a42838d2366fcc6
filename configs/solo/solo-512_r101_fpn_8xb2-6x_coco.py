"""Table 3.6: SOLO-512, ResNet-101."""

_base_ = './solo-512_r50_fpn_8xb2-6x_coco.py'

model = dict(
    backbone=dict(depth=101, init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet101'))
)
