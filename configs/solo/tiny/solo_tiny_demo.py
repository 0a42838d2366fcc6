"""SOLO at toy size: from random weights to useful masks in minutes on a CPU."""

_base_ = [
    '../_base_/solo_r50_fpn.py',
    '../../_base_/tiny/demo_instance.py',
    '../../_base_/tiny/demo_schedule.py',
    '../../_base_/tiny/runtime.py',
]

model = dict(
    backbone=dict(
        depth=18,
        base_channels=16,
        stem_channels=16,
        frozen_stages=-1,
        norm_eval=False,
        init_cfg=None,
    ),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=32, num_outs=4),
    mask_head=dict(
        num_classes=1,
        in_channels=32,
        feat_channels=64,
        stacked_convs=2,
        num_grids=[24, 18, 12, 8],
        in_strides=[4, 8, 16, 32],
        strides=[4, 8, 8, 16],  # finer than mmdet's, whose heads cannot: small objects are many,
        scale_ranges=[(1, 32), (12, 56), (40, 112), (72, 512)],
        center_ratio=1.0,
        norm_cfg=dict(type='GN', num_groups=8),
    ),
)
train_cfg = dict(max_iters=1600)
# A layer of masks has a channel a cell, and most cells are positive in few images: AdamW follows
# gradients that seldom come too slowly.
optim_wrapper = dict(
    optimizer=dict(fused=True),
    paramwise_cfg=dict(custom_keys={'mask_head.conv_mask': dict(lr_mult=10.0)}),
)
