"""mmdet's SOLOv2, the peer of ``solov2_tiny.py``: the same network."""

_base_ = './solov2_tiny.py'

model = dict(
    type='SOLOv2',
    mask_head=dict(
        _delete_=True,
        type='SOLOV2Head',
        num_classes=1,
        in_channels=32,
        feat_channels=64,
        stacked_convs=2,
        num_grids=[24, 18, 12, 8],
        strides=[8, 8, 16, 16],
        scale_ranges=[(1, 24), (12, 40), (24, 80), (48, 512)],
        norm_cfg=dict(type='GN', num_groups=8),
        mask_feature_head=dict(
            feat_channels=32,
            start_level=0,
            end_level=3,
            out_channels=64,
            mask_stride=4,
            norm_cfg=dict(type='GN', num_groups=8),
        ),
        loss_mask=dict(type='DiceLoss', use_sigmoid=True, loss_weight=3.0),
        loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
    ),
    test_cfg=dict(
        _delete_=True,
        nms_pre=500,
        score_thr=0.1,
        mask_thr=0.5,
        filter_thr=0.05,
        kernel='gaussian',
        sigma=2.0,
        max_per_img=100,
    ),
)
