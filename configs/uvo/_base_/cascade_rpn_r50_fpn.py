"""Model of the UVO 2021 proposal network with ResNet-50: row 6 of Table 1 (all but Swin-L).

Numbers are the paper's (sections 1.1 and 3.1); where it is silent they are the released code's: GN
in the towers, GIoU weight 2, anchor scale 8, the deltas' stds, and ``test_cfg`` but for NMS.
"""

custom_imports = dict(
    imports=[
        'mmdet_plugins.common.runtime',
        'mmdet_plugins.common.hooks',
        'mmdet_plugins.common.loops',
        'mmdet_plugins.common.datasets',
        'mmdet_plugins.common.open_world_metric',
        'mmdet_plugins.common.timm_backbone',
        'mmdet_plugins.cascade_rpn',
    ],
    allow_failed_imports=False,
)

model = dict(
    type='RPN',
    data_preprocessor=dict(
        type='DetDataPreprocessor',
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
        frozen_stages=1,
        norm_cfg=dict(type='BN', requires_grad=True),
        norm_eval=True,
        style='pytorch',
        init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet50'),
    ),
    neck=dict(
        type='UVOCARAFEFPN',
        in_channels=[256, 512, 1024, 2048],
        out_channels=256,
        num_outs=5,
        upsample_cfg=dict(
            type='carafe',
            up_kernel=5,
            up_group=1,
            encoder_kernel=3,
            encoder_dilation=1,
            compressed_channels=64,
        ),
    ),
    rpn_head=dict(
        type='UVOCascadeRPNHead',
        in_channels=256,
        feat_channels=256,
        strides=[4, 8, 16, 32, 64],
        anchor_scale=8,
        num_tower_convs=4,
        dcn_tower='first',
        norm_cfg=dict(type='GN', num_groups=32, requires_grad=True),
        loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type='GIoULoss', loss_weight=2.0),
        loss_iou=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0),
        stages=[
            dict(
                adapt_type='dilation',
                dilation=3,
                bridged_feature=True,
                with_cls=False,
                target_stds=[0.1, 0.1, 0.2, 0.2],
            ),
            dict(
                adapt_type='offset',
                bridged_feature=False,
                with_cls=True,
                target_stds=[0.05, 0.05, 0.1, 0.1],
            ),
        ],
    ),
    train_cfg=dict(
        rpn=dict(
            assigner=dict(
                type='UVOSimOTAAssigner', topk=10, center_rule='ratio', center_radius=0.25
            ),
            reg_assigner=dict(
                type='UVOSimOTAAssigner', topk=20, center_rule='ratio', center_radius=0.25
            ),
        )
    ),
    test_cfg=dict(
        rpn=dict(
            nms_pre=2000, max_per_img=2000, nms=dict(type='nms', iou_threshold=0.8), min_bbox_size=0
        )
    ),
)
