"""SOLOv2 with the width and depth that a CPU trains in minutes."""

_base_ = ['../../_base_/imports.py', '../../../_base_/models/solov2_r50_fpn.py']

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
        strides=[8, 8, 16, 16],
        scale_ranges=[(1, 24), (12, 40), (24, 80), (48, 512)],
        norm_cfg=dict(type='GN', num_groups=8),
        mask_features=dict(
            feat_channels=32, out_channels=64, norm_cfg=dict(type='GN', num_groups=8)
        ),
    ),
)
