"""Class-agnostic masks of a small set: one folder with images/ and instances_{train,val}.json."""

_base_ = './demo_detection.py'

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomFlip', prob=[0.25, 0.25], direction=['horizontal', 'vertical']),
    dict(type='PhotoMetricDistortion'),  # colours of objects seen tell nothing of others
    dict(type='PackDetInputs'),
]
# Grids are laid over the padded batch: images of one orientation need the least padding.
train_dataloader = dict(
    batch_sampler=dict(type='AspectRatioBatchSampler'), dataset=dict(pipeline=train_pipeline)
)

val_evaluator = dict(metric=['bbox', 'segm'])
test_evaluator = val_evaluator
