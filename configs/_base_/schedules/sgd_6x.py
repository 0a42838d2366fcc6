"""72 epochs of SGD at batch 16; the paper gives no steps, these are those of 3x doubled."""

_base_ = './sgd_1x.py'

max_epochs = 72
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    dict(type='LinearLR', start_factor=1 / 3, by_epoch=False, begin=0, end=500),
    dict(
        type='MultiStepLR', by_epoch=True, begin=0, end=max_epochs, milestones=[54, 66], gamma=0.1
    ),
]
