"""FreeSOLO at toy size: coarse masks of the embedded scenes, evaluated against the true ones.

Give DenseCL's weights as ``model.backbone.init_cfg``.
"""

_base_ = [
    './_base_/freesolo_tiny.py',
    '../../_base_/tiny/demo_instance.py',
    '../../_base_/tiny/demo_schedule.py',
    '../../_base_/tiny/runtime.py',
]

load_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='FreeSOLOLoadAnnotations'),
    dict(type='RandomFlip', prob=[0.25, 0.25], direction=['horizontal', 'vertical']),
]
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='MultiImageMixDataset',
        dataset=dict(
            type='FreeSOLODataset',
            ann_file='work_dirs/demo/free_mask/pseudo_labels.json',
            data_prefix=dict(img='work_dirs/demo/data/'),
            filter_cfg=dict(filter_empty_gt=True),
            pipeline=load_pipeline,
        ),
        pipeline=[dict(type='FreeSOLOCopyPaste'), dict(type='FreeSOLOPackInputs')],
    ),
)

train_cfg = dict(max_iters=300)
# At the 2e-3 of the other toy detectors some masks of iteration 1 end up as the whole image: to
# the pairwise loss they are perfect, and where they saturate the projections have no gradient.
optim_wrapper = dict(optimizer=dict(lr=7e-4))
