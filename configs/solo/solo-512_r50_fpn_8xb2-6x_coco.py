"""Table 3.6: SOLO-512, ResNet-50. The scales in training are those of the light models."""

_base_ = [
    './_base_/solo_r50_fpn.py',
    '../_base_/datasets/coco_instance_ms512.py',
    '../_base_/schedules/sgd_6x.py',
    'mmdet::_base_/default_runtime.py',
]

default_hooks = dict(checkpoint=dict(type='AtomicCheckpointHook'))
