"""COCO 2017 panoptic, the shorter side 640 to 800 px in training and 800 in testing."""

_base_ = 'mmdet::_base_/datasets/coco_panoptic.py'

train_pipeline = [
    dict(type='LoadImageFromFile', backend_args={{_base_.backend_args}}),
    dict(type='SOLOLoadPanopticAnnotations', backend_args={{_base_.backend_args}}),
    dict(
        type='RandomChoiceResize',
        scales=[(1333, short) for short in (640, 672, 704, 736, 768, 800)],
        keep_ratio=True,
    ),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile', backend_args={{_base_.backend_args}}),
    dict(type='Resize', scale=(1333, 800), keep_ratio=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

val_evaluator = dict(type='SOLOPanopticMetric')
test_evaluator = val_evaluator
