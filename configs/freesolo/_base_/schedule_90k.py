"""90k iterations, divided by 10 at 60k and 80k.

"The standard schedule" of section 6.3.1 is read as that of detectron2, on which the code is built.
"""

_base_ = './schedule_30k.py'

train_cfg = dict(max_iters=90000)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=1000),
    dict(type='MultiStepLR', by_epoch=False, milestones=[60000, 80000], gamma=0.1),
]
optim_wrapper = dict(optimizer=dict(lr=0.01))
