"""Table 4.8: SOLOv2, ResNet-50, 12 epochs at one scale."""

_base_ = [
    './_base_/imports.py',
    '../_base_/models/solov2_r50_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    '../_base_/schedules/sgd_1x.py',
    'mmdet::_base_/default_runtime.py',
]

default_hooks = dict(checkpoint=dict(type='AtomicCheckpointHook'))
