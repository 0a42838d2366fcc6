"""The light form: one tower of four convolutions for rows and columns, shorter side 512 px.

The thesis only names it; settings are the released code's.
"""

_base_ = [
    './_base_/decoupled_solo_r50_fpn.py',
    '../_base_/datasets/coco_instance_ms512.py',
    '../_base_/schedules/sgd_3x.py',
    'mmdet::_base_/default_runtime.py',
]

model = dict(
    mask_head=dict(
        shared_tower=True,
        stacked_convs=4,
        scale_ranges=[(1, 64), (32, 128), (64, 256), (128, 512), (256, 2048)],
    )
)
default_hooks = dict(checkpoint=dict(type='AtomicCheckpointHook'))
