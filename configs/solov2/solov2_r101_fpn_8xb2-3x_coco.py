"""Table 4.1: SOLOv2, ResNet-101."""

_base_ = './solov2_r50_fpn_8xb2-3x_coco.py'

model = dict(
    backbone=dict(depth=101, init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet101'))
)
