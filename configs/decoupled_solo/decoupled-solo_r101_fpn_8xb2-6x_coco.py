"""Table 3.1: Decoupled SOLO, ResNet-101, 72 epochs."""

_base_ = [
    './_base_/decoupled_solo_r50_fpn.py',
    '../_base_/datasets/coco_instance_ms.py',
    '../_base_/schedules/sgd_6x.py',
    'mmdet::_base_/default_runtime.py',
]

model = dict(
    backbone=dict(depth=101, init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet101'))
)
default_hooks = dict(checkpoint=dict(type='AtomicCheckpointHook'))
