"""20k iterations, divided by 10 at 12k and 18k (section 6.3.1); momentum and decay are SOLO's."""

_base_ = './schedule_30k.py'

train_cfg = dict(max_iters=20000)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=1000),
    dict(type='MultiStepLR', by_epoch=False, milestones=[12000, 18000], gamma=0.1),
]
optim_wrapper = dict(optimizer=dict(lr=0.01))
