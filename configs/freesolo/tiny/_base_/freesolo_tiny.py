"""FreeSOLO with the width and depth that a CPU trains in minutes."""

_base_ = '../../_base_/freesolo_r50_fpn.py'

model = dict(
    data_preprocessor=dict(bottom_pixels_removed=0),
    backbone=dict(
        depth=18,
        base_channels=32,
        stem_channels=32,
        norm_cfg=dict(requires_grad=True),
        norm_eval=False,
        conv_cfg=dict(type='Conv2d', padding_mode='replicate'),
        init_cfg=None,
    ),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64, num_outs=4),
    mask_head=dict(
        in_channels=64,
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
        embed_dims=64,
        loss_mask=dict(warmup_iters=100),
    ),
)
