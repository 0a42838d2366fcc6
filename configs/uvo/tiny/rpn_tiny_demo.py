"""mmdet's RPN, row 0 of Table 1, at the toy size of ``cascade-rpn_tiny_demo.py``."""

_base_ = [
    '../_base_/rpn_r50_fpn.py',
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
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=32, num_outs=4),
    rpn_head=dict(
        in_channels=32,
        feat_channels=32,
        anchor_generator=dict(scales=[4], strides=[4, 8, 16, 32]),
    ),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=100)),
)
