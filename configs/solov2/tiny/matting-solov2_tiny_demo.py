"""Matting at toy size, on the scenes of ``python -m mmdet_plugins.solo.synthetic mattes``.

Give the weights of ``solov2_tiny_demo.py`` trained on the same objects by ``load_from``, or set
``model.mask_head.freeze_categories=False`` to start from nothing.
"""

_base_ = './solov2_tiny_demo.py'

data_root = 'work_dirs/demo/mattes/'

model = dict(
    type='SOLOMattingSegmentor',
    mask_head=dict(type='SOLOMattingHead', loss_matte_weight=10.0),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='SOLOLoadMattes'),
    dict(type='RandomFlip', prob=[0.25, 0.25], direction=['horizontal', 'vertical']),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale_factor=1.0, keep_ratio=True),
    dict(type='SOLOLoadMattes'),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]
dataset = dict(
    _delete_=True,
    type='SOLOMatteDataset',
    data_root=data_root,
    data_prefix=dict(img='scenes/images/', matte='scenes/mattes/'),
)
train_dataloader = dict(batch_sampler=None, dataset=dict(**dataset, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(**dataset, test_mode=True, pipeline=test_pipeline))
test_dataloader = val_dataloader

# The second one says what ordinary masks are worth.
val_evaluator = [
    dict(type='SOLOMattingMetric'),
    dict(type='SOLOMattingMetric', source='masks', prefix='mask'),
]
test_evaluator = val_evaluator
