"""Panoptic SOLOv2 at toy size, on ``python -m mmdet_plugins.solo.synthetic panoptic``'s set."""

_base_ = './solov2_tiny_demo.py'

data_root = 'work_dirs/demo/panoptic/'
classes = ('disc', 'box', 'star', 'blob', 'capsule', 'plain', 'grain', 'tiles')
metainfo = dict(classes=classes, thing_classes=classes[:5], stuff_classes=classes[5:])

model = dict(
    type='SOLOPanopticSegmentor',
    data_preprocessor=dict(pad_seg=True, seg_pad_value=255),
    backbone=dict(base_channels=32, stem_channels=32),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64),
    mask_head=dict(num_classes=5, in_channels=64),
    semantic_head=dict(
        type='SOLOSemanticHead',
        num_things_classes=5,
        num_stuff_classes=3,
        in_channels=64,
        inner_channels=32,
        norm_cfg=dict(type='GN', num_groups=8),
        loss_seg=dict(
            type='CrossEntropyLoss', ignore_index=255, avg_non_ignore=True, loss_weight=0.5
        ),
    ),
    test_cfg=dict(
        score_thr=0.3,
        filter_thr=0.3,
        mask_format='dense',
        panoptic=dict(min_score=0.3, max_overlap=0.5, min_stuff_area=64),
    ),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='SOLOLoadPanopticAnnotations'),
    dict(type='RandomFlip', prob=[0.25, 0.25], direction=['horizontal', 'vertical']),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(
    dataset=dict(
        type='CocoPanopticDataset',
        data_root=data_root,
        metainfo=metainfo,
        ann_file='panoptic_train.json',
        data_prefix=dict(img='images/', seg='panoptic_train/'),
        pipeline=train_pipeline,
    )
)
val_dataloader = dict(
    dataset=dict(
        type='CocoPanopticDataset',
        data_root=data_root,
        metainfo=metainfo,
        ann_file='panoptic_val.json',
        data_prefix=dict(img='images/', seg='panoptic_val/'),
    )
)
test_dataloader = val_dataloader

val_evaluator = dict(
    _delete_=True,
    type='SOLOPanopticMetric',
    ann_file=data_root + 'panoptic_val.json',
    seg_prefix=data_root + 'panoptic_val/',
)
test_evaluator = val_evaluator
