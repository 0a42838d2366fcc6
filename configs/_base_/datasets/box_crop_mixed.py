# One crop per instance of COCO, Open Images and Pascal VOC (paper, section 2.2). The latter two
# come from tools/convert/openimages_to_coco.py and voc_to_coco.py.
crop_size = (512, 512)
margin_px = 20

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
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='BoxCropFromMask', margin_px=margin_px),
    dict(type='Resize', scale=crop_size, keep_ratio=False),
    dict(type='BoxCropLoadMask'),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)],
            [dict(type='PackSegInputs')],
        ],
    ),
]

train_dataloader = dict(
    batch_size=4,
    num_workers=4,
    persistent_workers=True,
    # Without weights each data set has the share of its instances, as in the released training.
    sampler=dict(type='BoxCropMixSampler', weights=None),
    dataset=dict(
        type='ConcatDataset',
        datasets=[
            dict(
                type='BoxCropDataset',
                data_root='data/coco/',
                ann_file='annotations/instances_train2017.json',
                data_prefix=dict(img_path='train2017/'),
                pipeline=train_pipeline,
            ),
            dict(
                type='BoxCropDataset',
                data_root='data/openimages/',
                ann_file='annotations/instances_train.json',
                data_prefix=dict(img_path='train/'),
                pipeline=train_pipeline,
            ),
            dict(
                type='BoxCropDataset',
                data_root='data/VOCdevkit/VOC2012/',
                ann_file='annotations/instances_trainval.json',
                data_prefix=dict(img_path='JPEGImages/'),
                pipeline=train_pipeline,
            ),
        ],
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='BoxCropDataset',
        data_root='data/coco/',
        ann_file='annotations/instances_val2017.json',
        data_prefix=dict(img_path='val2017/'),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader

val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
