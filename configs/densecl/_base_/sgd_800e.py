"""800 epochs of SGD at batch 256 from a rate of 0.3."""

_base_ = './sgd_200e.py'

max_epochs = 800
train_cfg = dict(max_epochs=max_epochs)
optim_wrapper = dict(optimizer=dict(lr=0.3))
param_scheduler = [dict(type='CosineAnnealingLR', eta_min=0.0, by_epoch=True, T_max=max_epochs)]
