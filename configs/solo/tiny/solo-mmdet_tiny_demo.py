"""mmdet's SOLO, the peer of ``solo_tiny_demo.py``: the same network, trained alike."""

_base_ = './solo_tiny_demo.py'

model = dict(
    type='SOLO',
    mask_head=dict(
        _delete_=True,
        type='SOLOHead',
        num_classes=1,
        in_channels=32,
        feat_channels=64,
        stacked_convs=2,
        num_grids=[24, 18, 12, 8],
        strides=[8, 8, 16, 16],
        scale_ranges=[(1, 32), (12, 56), (40, 112), (72, 512)],
        pos_scale=1.0,
        norm_cfg=dict(type='GN', num_groups=8),
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
