"""Table 1, row 0: the baseline, mmdet's RPN."""

_base_ = [
    './_base_/rpn_r50_fpn.py',
    '../_base_/datasets/coco_open_world.py',
    'mmdet::_base_/schedules/schedule_1x.py',
    'mmdet::_base_/default_runtime.py',
]

default_hooks = dict(checkpoint=dict(type='AtomicCheckpointHook'))
