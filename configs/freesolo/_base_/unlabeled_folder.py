"""A folder of images, ``test_dataloader.dataset.data_root``, and where its labels go."""

test_dataloader = dict(
    batch_size=16,
    num_workers=4,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    batch_sampler=dict(type='FreeSOLOPlannedBatches'),
    dataset=dict(
        type='FreeSOLOImageDataset',
        data_root='data/images/',
        sources=[dict(img='')],
        pipeline=[
            dict(type='FreeSOLOLoadImage'),
            dict(type='Resize', scale=(1333, 800), keep_ratio=True),
            dict(type='FreeSOLOPackImage'),
        ],
    ),
)
test_evaluator = dict(type='FreeSOLOStoreMetric')
test_cfg = dict(type='TestLoop')

custom_hooks = [dict(type='FreeSOLOStoreHook', folder='work_dirs/free_mask/')]
