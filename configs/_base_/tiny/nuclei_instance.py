"""Masks of a set with images of many sizes: crops for training, whole images for testing.

Made for nuclei in microscopy (a sample of BBBC038: 165 + 50 images of 256x256 to 1024x1024 px).
"""

_base_ = './demo_detection.py'

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomCrop', crop_size=(192, 192), allow_negative_crop=True),
    dict(type='RandomFlip', prob=[0.25, 0.25], direction=['horizontal', 'vertical']),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))

val_evaluator = dict(metric=['bbox', 'segm'])
test_evaluator = val_evaluator
