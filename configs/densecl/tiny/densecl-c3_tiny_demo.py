"""DenseCL at toy size on features of stride 8, whose coarse masks are finer; cheap.

Borders are replicated: with zeros the features of a net this shallow tell the border of the image
from its inside rather than objects from the ground, and match cells by their place in the view
(``densecl/same_place``).
"""

_base_ = './densecl_tiny_demo.py'

model = dict(
    backbone=dict(
        num_stages=2,
        strides=(1, 2),
        dilations=(1, 1),
        out_indices=(1,),
        conv_cfg=dict(type='Conv2d', padding_mode='replicate'),
    ),
    head=dict(in_channels=64, grid_size=8),
)
views = dict(type='DenseCLTwoViews', size=64, scale=(0.15, 0.7), blur_sigma=(0.1, 1.0))
train_pipeline = [dict(type='LoadImageFromFile'), views]
test_pipeline = [dict(type='LoadImageFromFile'), dict(**views, pairs=4, seed=0)]
train_dataloader = dict(batch_size=16, dataset=dict(pipeline=train_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
train_cfg = dict(max_iters=200)
