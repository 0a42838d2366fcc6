"""The challenge's detector: row 7, fine-tuned on UVO-Sparse and UVO-Dense for 6 epochs.

Epochs are the paper's; learning rate and steps, on which it is silent, the released code's.
"""

_base_ = [
    './_base_/cascade_rpn_swinl.py',
    './_base_/cascade_rpn_tta.py',
    '../_base_/datasets/uvo_open_world.py',
    '../_base_/schedules/adamw_1x.py',
    'mmdet::_base_/default_runtime.py',
]

model = dict(backbone=dict(init_cfg=None))
load_from = 'work_dirs/cascade_rpn_swinl/epoch_12.pth'

max_epochs = 6
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=max_epochs, milestones=[3, 5], gamma=0.1),
]
optim_wrapper = dict(optimizer=dict(lr=1e-5))
default_hooks = dict(checkpoint=dict(type='AtomicCheckpointHook'))
