"""DenseCL at toy size: minutes on a CPU, on the training images of the made-up scenes."""

_base_ = [
    '../_base_/densecl_r50.py',
    '../_base_/two_views.py',
    '../../_base_/tiny/demo_schedule.py',
    'mmdet::_base_/default_runtime.py',
]

model = dict(
    backbone=dict(
        depth=18,
        base_channels=32,
        stem_channels=32,
        num_stages=3,
        strides=(1, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(2,),
    ),
    head=dict(in_channels=128, hidden_channels=128, out_channels=64, grid_size=6),
    momentum=0.99,
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='DenseCLTwoViews', size=96, blur_sigma=(0.1, 1.0)),
]
train_dataloader = dict(
    batch_size=32,
    num_workers=0,
    persistent_workers=False,
    pin_memory=False,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='OpenWorldCocoDataset',
        data_root='work_dirs/demo/data/',
        ann_file='instances_train.json',
        data_prefix=dict(img='images/'),
        pipeline=train_pipeline,
    ),
)
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='DenseCLTwoViews', size=96, blur_sigma=(0.1, 1.0), pairs=8, seed=0),
]
test_dataloader = dict(
    batch_size=8,
    num_workers=0,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='OpenWorldCocoDataset',
        data_root='work_dirs/demo/data/',
        ann_file='instances_val.json',
        data_prefix=dict(img='images/'),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_evaluator = dict(type='DenseCLCorrespondence')
val_cfg = None
log_processor = dict(by_epoch=False)
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(type='AtomicCheckpointHook', by_epoch=False, interval=100, max_keep_ckpts=1),
)
