"""DenseCL at toy size on tiles of nuclei, in views that show them enlarged."""

_base_ = './densecl-c3_tiny_demo.py'

views = dict(type='DenseCLTwoViews', size=80, scale=(0.15, 0.7), blur_sigma=(0.1, 1.0))
train_pipeline = [dict(type='LoadImageFromFile'), views]
test_pipeline = [dict(type='LoadImageFromFile'), dict(**views, pairs=4, seed=0)]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
