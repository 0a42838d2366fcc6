"""Photographs of COCO with their persons, and objects with mattes pasted over them.

Mattes are yours to supply: ``data/matting/{train,val}/images`` and ``.../mattes``, as
``mmdet_plugins/solo/matting_data.py`` says. The thesis took 880 of persons.
"""

_base_ = 'mmdet::_base_/datasets/coco_instance.py'

matting_root = 'data/matting/'
metainfo = dict(classes=('person',))  # label 0, as among all of COCO's

train_pipeline = [
    dict(type='LoadImageFromFile', backend_args={{_base_.backend_args}}),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(
        type='RandomChoiceResize',
        scales=[(1333, short) for short in (640, 672, 704, 736, 768, 800)],
        keep_ratio=True,
    ),
    dict(
        type='SOLOPasteMattes',
        pairs=dict(
            type='SOLOMatteDataset',
            data_root=matting_root + 'train/',
            data_prefix=dict(img='images/', matte='mattes/'),
            lazy_init=True,
        ),
        num=(1, 3),
        scale=(0.3, 0.9),
    ),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile', backend_args={{_base_.backend_args}}),
    dict(type='Resize', scale=(1333, 800), keep_ratio=True),
    dict(type='SOLOLoadMattes', backend_args={{_base_.backend_args}}),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
train_dataloader = dict(dataset=dict(metainfo=metainfo, pipeline=train_pipeline))
val_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='SOLOMatteDataset',
        data_root=matting_root + 'val/',
        data_prefix=dict(img='images/', matte='mattes/'),
        test_mode=True,
        pipeline=test_pipeline,
    )
)
test_dataloader = val_dataloader

# The second one says what ordinary masks are worth.
val_evaluator = [
    dict(type='SOLOMattingMetric'),
    dict(type='SOLOMattingMetric', source='masks', prefix='mask'),
]
test_evaluator = val_evaluator
