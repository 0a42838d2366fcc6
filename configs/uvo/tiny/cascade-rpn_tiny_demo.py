"""The detector of UVO 2021 at toy size: from random weights to useful boxes in minutes on a CPU."""

_base_ = [
    '../_base_/cascade_rpn_r50_fpn.py',
    '../../_base_/tiny/demo_detection.py',
    '../../_base_/tiny/demo_schedule.py',
    '../../_base_/tiny/runtime.py',
]

model = dict(
    backbone=dict(
        depth=18,
        base_channels=32,
        stem_channels=32,
        frozen_stages=-1,
        norm_eval=False,
        init_cfg=None,
    ),
    neck=dict(
        in_channels=[32, 64, 128, 256],
        out_channels=32,
        num_outs=4,
        upsample_cfg=dict(compressed_channels=16),
    ),
    rpn_head=dict(
        in_channels=32,
        feat_channels=32,
        strides=[4, 8, 16, 32],
        anchor_scale=4,
        num_tower_convs=2,
        dcn_tower=None,  # halves the step on a CPU
        norm_cfg=dict(num_groups=8),
    ),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=100)),
)
