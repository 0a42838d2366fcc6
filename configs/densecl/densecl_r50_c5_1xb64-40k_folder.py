"""DenseCL on a folder of images, on one GPU: ``train_dataloader.dataset.data_root=...``."""

_base_ = [
    './_base_/densecl_r50.py',
    './_base_/two_views.py',
    '../_base_/runtime_by_iter.py',
]

train_dataloader = dict(
    batch_size=64,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(data_root='data/images/'),
)
train_cfg = dict(type='ResumableIterBasedTrainLoop', max_iters=40000, val_interval=100000)
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='SGD', lr=0.075, momentum=0.9, weight_decay=1e-4)
)
param_scheduler = [dict(type='CosineAnnealingLR', eta_min=0.0, by_epoch=False)]
auto_scale_lr = dict(enable=False, base_batch_size=64)
default_hooks = dict(checkpoint=dict(interval=1000))
