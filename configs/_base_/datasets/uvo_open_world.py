"""UVO-Sparse and UVO-Dense, scored on the validation frames of UVO-Sparse.

Annotations as UVO hands them out; frames cut from the videos into one folder a video. Sparse
frames are shown three times as often, as in the released code; it also trains on the validation
split, which this does not.
"""

_base_ = './coco_open_world.py'
train_pipeline = {{_base_.train_pipeline}}

dataset_type = 'UVODataset'
data_root = 'data/uvo/'

train_sparse = dict(
    type='RepeatDataset',
    times=3,
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        ann_file='FrameSet/UVO_frame_train.json',
        data_prefix=dict(img='uvo_videos_sparse_frames/'),
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        pipeline=train_pipeline,
    ),
)
train_dense = dict(
    type=dataset_type,
    data_root=data_root,
    ann_file='VideoDenseSet/UVO_video_train_dense.json',
    data_prefix=dict(img='uvo_videos_dense_frames/'),
    filter_cfg=dict(filter_empty_gt=True, min_size=32),
    pipeline=train_pipeline,
)
train_dataloader = dict(
    dataset=dict(_delete_=True, type='ConcatDataset', datasets=[train_sparse, train_dense])
)
val_dataloader = dict(
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        ann_file='FrameSet/UVO_frame_val.json',
        data_prefix=dict(img='uvo_videos_sparse_frames/'),
    )
)
test_dataloader = val_dataloader

val_evaluator = dict(ann_file=data_root + 'FrameSet/UVO_frame_val.json')
test_evaluator = val_evaluator
