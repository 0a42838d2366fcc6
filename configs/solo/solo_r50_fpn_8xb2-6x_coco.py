"""Tables 3.1 and 3.6: SOLO, ResNet-50, 72 epochs."""

_base_ = [
    './_base_/solo_r50_fpn.py',
    '../_base_/datasets/coco_instance_ms.py',
    '../_base_/schedules/sgd_6x.py',
    'mmdet::_base_/default_runtime.py',
]

default_hooks = dict(checkpoint=dict(type='AtomicCheckpointHook'))
