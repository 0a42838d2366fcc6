"""Self-training at toy size: ``mim test`` of this writes the next pseudo-labels."""

_base_ = './freesolo_tiny_demo.py'

test_dataloader = dict(
    _delete_=True,
    batch_size=8,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    batch_sampler=dict(type='FreeSOLOPlannedBatches'),
    dataset=dict(
        type='FreeSOLOImageDataset',
        data_root='work_dirs/demo/data/',
        sources=[dict(ann_file='instances_train.json', img='images/')],
        pipeline=[
            dict(type='FreeSOLOLoadImage'),
            dict(type='Resize', scale_factor=1.0, keep_ratio=True),
            dict(type='FreeSOLOPackImage'),
        ],
    ),
)
test_evaluator = dict(_delete_=True, type='FreeSOLOStoreMetric', score_thr=0.3)
custom_hooks = [dict(type='FreeSOLOStoreHook', folder='work_dirs/demo/freesolo_labels_1/')]
