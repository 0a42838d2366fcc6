"""Decoupled SOLO, ResNet-50, 36 epochs."""

_base_ = [
    './_base_/decoupled_solo_r50_fpn.py',
    '../_base_/datasets/coco_instance_ms.py',
    '../_base_/schedules/sgd_3x.py',
    'mmdet::_base_/default_runtime.py',
]

default_hooks = dict(checkpoint=dict(type='AtomicCheckpointHook'))
