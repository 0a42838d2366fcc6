"""SOLO, ResNet-50, 36 epochs: the reference of Tables 3.2 to 3.5."""

_base_ = [
    './_base_/solo_r50_fpn.py',
    '../_base_/datasets/coco_instance_ms.py',
    '../_base_/schedules/sgd_3x.py',
    'mmdet::_base_/default_runtime.py',
]

default_hooks = dict(checkpoint=dict(type='AtomicCheckpointHook'))
