"""UVO-Sparse and UVO-Dense, scored on the validation frames of UVO-Sparse.

Annotations as UVO hands them out; frames cut from the videos into one folder a video. Sparse
frames are shown three times as often, as in the released code; it also trains on the validation
split, which this does not.
"""

data_root = 'data/uvo/'
backend_args = None

train_pipeline = [
    dict(type='LoadImageFromFile', backend_args=backend_args),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=(1333, 800), keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile', backend_args=backend_args),
    dict(type='Resize', scale=(1333, 800), keep_ratio=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
train_sparse = dict(
    type='RepeatDataset',
    times=3,
    dataset=dict(
        type='UVODataset',
        data_root=data_root,
        ann_file='FrameSet/UVO_frame_train.json',
        data_prefix=dict(img='uvo_videos_sparse_frames/'),
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        pipeline=train_pipeline,
        backend_args=backend_args,
    ),
)
train_dense = dict(
    type='UVODataset',
    data_root=data_root,
    ann_file='VideoDenseSet/UVO_video_train_dense.json',
    data_prefix=dict(img='uvo_videos_dense_frames/'),
    filter_cfg=dict(filter_empty_gt=True, min_size=32),
    pipeline=train_pipeline,
    backend_args=backend_args,
)
train_dataloader = dict(
    batch_size=2,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    batch_sampler=dict(type='AspectRatioBatchSampler'),
    dataset=dict(type='ConcatDataset', datasets=[train_sparse, train_dense]),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='UVODataset',
        data_root=data_root,
        ann_file='FrameSet/UVO_frame_val.json',
        data_prefix=dict(img='uvo_videos_sparse_frames/'),
        test_mode=True,
        pipeline=test_pipeline,
        backend_args=backend_args,
    ),
)
test_dataloader = val_dataloader

val_evaluator = dict(
    type='OpenWorldMetric',
    ann_file=data_root + 'FrameSet/UVO_frame_val.json',
    metric='bbox',
    max_dets=[100, 300, 1000],
)
test_evaluator = val_evaluator
