"""Two views of each image of a folder; a leaf says which folder."""

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='DenseCLTwoViews',
        size=224,
        scale=(0.2, 1.0),
        jitter=(0.4, 0.4, 0.4, 0.1),
        jitter_prob=0.8,
        grey_prob=0.2,
        blur_sigma=(0.1, 2.0),
        blur_prob=0.5,
        flip_prob=0.5,
    ),
]
train_dataloader = dict(
    batch_size=32,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='ImageFolderDataset', pipeline=train_pipeline),
)
custom_hooks = [dict(type='DenseCLQueueSizeHook')]
