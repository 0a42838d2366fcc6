"""Free Mask on the last features of ResNet-50 (section 6.2.2); weights come by ``--checkpoint``."""

custom_imports = dict(
    imports=[
        'mmdet_plugins.common.runtime',
        'mmdet_plugins.common.datasets',
        'mmdet_plugins.common.open_world_metric',
        'mmdet_plugins.freesolo',
    ],
    allow_failed_imports=False,
)

model = dict(
    type='FreeSOLOFreeMask',
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
    ),
    backbone=dict(
        type='ResNet',
        depth=50,
        num_stages=4,
        out_indices=(3,),
        norm_cfg=dict(type='BN'),
        style='pytorch',
    ),
    free_mask=dict(
        scales=(1.0, 0.5, 0.25), mask_thr=0.5, min_cells=2, sigma=2.0, min_score=0.7, max_num=20
    ),
)
