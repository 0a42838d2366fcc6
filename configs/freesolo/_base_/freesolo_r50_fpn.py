"""FreeSOLO with ResNet-50 and FPN (thesis, section 6.2.3): SOLOv2's network without classes.

Where it is silent the released code is followed: no stage of the backbone is frozen but the
normalisation is, the warm-up of the pairwise loss, scale ranges, NMS.
"""

custom_imports = dict(
    imports=[
        'mmdet_plugins.common.runtime',
        'mmdet_plugins.common.hooks',
        'mmdet_plugins.common.loops',
        'mmdet_plugins.common.datasets',
        'mmdet_plugins.common.open_world_metric',
        'mmdet_plugins.freesolo',
    ],
    allow_failed_imports=False,
)

model = dict(
    type='LocationSegmentor',
    data_preprocessor=dict(
        type='FreeSOLODataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=32,
    ),
    backbone=dict(
        type='ResNet',
        depth=50,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        frozen_stages=-1,
        norm_cfg=dict(type='BN', requires_grad=False),
        norm_eval=True,
        style='pytorch',
        init_cfg=dict(type='Pretrained', checkpoint='work_dirs/densecl_r50.pth'),
    ),
    neck=dict(type='FPN', in_channels=[256, 512, 1024, 2048], out_channels=256, num_outs=5),
    mask_head=dict(
        type='FreeSOLOHead',
        num_classes=1,
        in_channels=256,
        feat_channels=512,
        stacked_convs=4,
        mask_features=dict(type='UnifiedMaskFeatures', out_channels=256, with_coords=True),
        num_grids=[40, 36, 24, 16, 12],
        in_strides=[4, 8, 16, 32, 64],
        strides=[8, 8, 16, 32, 32],
        scale_ranges=[(1, 96), (48, 192), (96, 384), (192, 768), (384, 2048)],
        center_ratio=0.2,
        embed_dims=2048,
        embed_weight=4.0,
        loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_mask=dict(type='FreeSOLOWeakMaskLoss'),
    ),
    test_cfg=dict(
        score_thr=0.1,
        mask_thr=0.5,
        maskness=True,
        nms_pre=500,
        nms='matrix',
        kernel='gaussian',
        sigma=2.0,
        filter_thr=0.05,
        max_per_img=100,
    ),
)
