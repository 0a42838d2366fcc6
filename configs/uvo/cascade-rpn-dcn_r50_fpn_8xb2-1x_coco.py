"""Table 1, row 6 (+ DCNv2): the reference; the other rows are this one without later additions."""

_base_ = [
    './_base_/cascade_rpn_r50_fpn.py',
    './_base_/cascade_rpn_tta.py',
    '../_base_/datasets/coco_open_world.py',
    'mmdet::_base_/schedules/schedule_1x.py',
    'mmdet::_base_/default_runtime.py',
]

# As in mmdet's Cascade RPN.
optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))
default_hooks = dict(checkpoint=dict(type='AtomicCheckpointHook'))
