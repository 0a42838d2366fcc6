"""Table 1, row 7 (+ Swin-L): AdamW, batch 16 (8 GPUs with 2 images), 12 epochs of COCO."""

_base_ = [
    './_base_/cascade_rpn_swinl.py',
    './_base_/cascade_rpn_tta.py',
    '../_base_/datasets/coco_open_world.py',
    '../_base_/schedules/adamw_1x.py',
    'mmdet::_base_/default_runtime.py',
]

default_hooks = dict(checkpoint=dict(type='AtomicCheckpointHook'))
