"""Table 5.2: FCOS on COCO, 12 epochs, the shorter side 640 to 800 px as AdelaiDet has it."""

_base_ = 'mmdet::fcos/fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco.py'

custom_imports = dict(
    imports=['mmdet_plugins.common.runtime', 'mmdet_plugins.common.hooks'],
    allow_failed_imports=False,
)

model = dict(
    data_preprocessor=dict(
        mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True
    ),
    backbone=dict(
        style='pytorch',
        init_cfg=dict(type='Pretrained', checkpoint='work_dirs/densecl_r50.pth'),
    ),
)
train_pipeline = [
    dict(type='LoadImageFromFile', backend_args={{_base_.backend_args}}),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='RandomChoiceResize',
        scales=[(1333, short) for short in (640, 672, 704, 736, 768, 800)],
        keep_ratio=True,
    ),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
default_hooks = dict(checkpoint=dict(type='AtomicCheckpointHook'))
