"""DenseCL on the last of four stages, as at full size, but thin: what ``compare.py`` trains.

Deep features lose places unless something holds them; those of ``densecl_tiny_demo.py``, of three
stages on larger views, are made for Free Mask.
"""

_base_ = './densecl_tiny_demo.py'

model = dict(
    backbone=dict(
        base_channels=16,
        stem_channels=16,
        num_stages=4,
        strides=(1, 2, 2, 1),
        dilations=(1, 1, 1, 1),
        out_indices=(3,),
    ),
    head=dict(in_channels=128, grid_size=5),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='DenseCLTwoViews', size=80, blur_sigma=(0.1, 1.0)),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='DenseCLTwoViews', size=80, blur_sigma=(0.1, 1.0), pairs=8, seed=0),
]
train_dataloader = dict(batch_size=16, dataset=dict(pipeline=train_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
train_cfg = dict(max_iters=300)
