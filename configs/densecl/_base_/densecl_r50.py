"""DenseCL with ResNet-50 (thesis, section 5.3; where it is silent, the released code)."""

custom_imports = dict(
    imports=[
        'mmdet_plugins.common.runtime',
        'mmdet_plugins.common.hooks',
        'mmdet_plugins.common.loops',
        'mmdet_plugins.common.datasets',
        'mmdet_plugins.common.image_folder',
        'mmdet_plugins.densecl',
    ],
    allow_failed_imports=False,
)

model = dict(
    type='DenseCL',
    data_preprocessor=dict(
        type='DenseCLDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
    ),
    backbone=dict(
        type='ResNet',
        depth=50,
        num_stages=4,
        out_indices=(3,),
        frozen_stages=-1,
        norm_cfg=dict(type='BN', requires_grad=True),
        norm_eval=False,
        zero_init_residual=False,
        style='pytorch',
    ),
    head=dict(
        type='DenseCLHead',
        in_channels=2048,
        hidden_channels=2048,
        out_channels=128,
        grid_size=7,
    ),
    dense_weight=0.5,
    matching='backbone',
    negatives='pooled',
    queue_size=65536,
    momentum=0.999,
    temperature=0.2,
    shuffle_bn=True,
)
