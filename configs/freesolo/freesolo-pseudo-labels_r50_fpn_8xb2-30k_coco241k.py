"""Self-training: ``mim test`` of this writes what the reference finds as the next pseudo-labels."""

_base_ = './freesolo_r50_fpn_8xb2-30k_coco241k.py'

test_dataloader = dict(
    _delete_=True,
    batch_size=8,
    num_workers=4,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    batch_sampler=dict(type='FreeSOLOPlannedBatches'),
    dataset=dict(
        type='FreeSOLOImageDataset',
        data_root='data/coco/',
        sources=[
            dict(ann_file='annotations/instances_train2017.json', img='train2017/'),
            dict(ann_file='annotations/image_info_unlabeled2017.json', img='unlabeled2017/'),
        ],
        pipeline=[
            dict(type='FreeSOLOLoadImage'),
            dict(type='Resize', scale=(1333, 800), keep_ratio=True),
            dict(
                type='PackDetInputs',
                meta_keys=(
                    'img_id',
                    'img_path',
                    'ori_shape',
                    'img_shape',
                    'scale_factor',
                    'position',
                    'unreadable',
                ),
            ),
        ],
    ),
)
test_evaluator = dict(_delete_=True, type='FreeSOLOStoreMetric', score_thr=0.3)
custom_hooks = [dict(type='FreeSOLOStoreHook', folder='work_dirs/freesolo_labels_1/')]
