"""One crop per instance of a small set: a folder with images/ and instances_{train,val}.json."""

dataset_type = 'BoxCropDataset'
data_root = 'work_dirs/demo/data/'
crop_size = (64, 64)
margin_px = 8

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='BoxCropFromMask', margin_px=margin_px, jitter_ratio=0.1),
    dict(type='BoxCropLoadMask'),
    dict(type='Resize', scale=crop_size, keep_ratio=False),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='BoxCropFromMask', margin_px=margin_px),
    dict(type='Resize', scale=crop_size, keep_ratio=False),
    dict(type='BoxCropLoadMask'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=32,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        ann_file='instances_train.json',
        data_prefix=dict(img_path='images/'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        ann_file='instances_val.json',
        data_prefix=dict(img_path='images/'),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader

val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
