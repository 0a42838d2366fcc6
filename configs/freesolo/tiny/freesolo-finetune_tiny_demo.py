"""Fine-tuning at toy size, with a tenth of the labels of the embedded scenes, as one class.

From nothing, for comparison: ``custom_hooks=[]``.
"""

_base_ = './freesolo_tiny_demo.py'

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomFlip', prob=[0.25, 0.25], direction=['horizontal', 'vertical']),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='FreeSOLOFewShotDataset',
        fraction=0.1,
        class_agnostic=True,
        data_root='work_dirs/demo/data/',
        ann_file='instances_train.json',
        data_prefix=dict(img='images/'),
        pipeline=train_pipeline,
    )
)
model = dict(
    data_preprocessor=dict(
        _delete_=True,
        type='DetDataPreprocessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_size_divisor=32,
    ),
    mask_head=dict(loss_mask=dict(_delete_=True, type='SOLODiceLoss'), embed_dims=None),
)
custom_hooks = [
    dict(type='FreeSOLOTransferHook', checkpoint='work_dirs/freesolo_tiny_demo/iter_300.pth')
]
train_cfg = dict(max_iters=150)
