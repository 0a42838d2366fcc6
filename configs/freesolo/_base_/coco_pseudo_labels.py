"""Pseudo-labels of COCO train2017 and unlabeled2017, evaluated on val2017 without its classes.

``file_name`` in the pseudo-labels is relative to ``data/coco/``, as ``train2017/000000000009.jpg``.
Photographs of one's own: change ``ann_file`` and ``data_prefix``.
"""

_base_ = '../../_base_/datasets/coco_open_world.py'

load_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='FreeSOLOLoadAnnotations'),
    dict(
        type='RandomChoiceResize',
        scales=[(1333, short) for short in (640, 672, 704, 736, 768, 800)],
        keep_ratio=True,
    ),
    dict(type='RandomFlip', prob=0.5),
]
train_dataloader = dict(
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        _delete_=True,
        type='MultiImageMixDataset',
        dataset=dict(
            type='FreeSOLODataset',
            ann_file='work_dirs/free_mask_coco/pseudo_labels.json',
            data_prefix=dict(img='data/coco/'),
            filter_cfg=dict(filter_empty_gt=True, min_size=32),
            pipeline=load_pipeline,
        ),
        pipeline=[dict(type='FreeSOLOCopyPaste'), dict(type='FreeSOLOPackInputs')],
    ),
)
val_evaluator = dict(metric=['bbox', 'segm'], max_dets=[1, 10, 100])
test_evaluator = val_evaluator
