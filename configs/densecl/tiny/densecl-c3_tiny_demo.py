"""DenseCL on small features of stride 8: what ``projects/densecl/compare.py`` trains.

Deeper thin networks on small views know the place of a cell by their padding, and match places
(``densecl/same_place``). The queue is shorter than the hook would have it: where images are few,
too many keys of half of them are of the very image that is asked for.
"""

_base_ = './densecl_tiny_demo.py'

model = dict(
    backbone=dict(
        base_channels=16,
        stem_channels=16,
        num_stages=2,
        strides=(1, 2),
        dilations=(1, 1),
        out_indices=(1,),
    ),
    head=dict(in_channels=32, grid_size=8),
    queue_size=64,
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='DenseCLTwoViews', size=64, blur_sigma=(0.1, 1.0)),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='DenseCLTwoViews', size=64, blur_sigma=(0.1, 1.0), pairs=4, seed=0),
]
train_dataloader = dict(batch_size=16, dataset=dict(pipeline=train_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
