"""200 epochs of SGD at batch 256, the rate of MoCo-v2 falling along a cosine."""

max_epochs = 200
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs)
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='SGD', lr=0.03, momentum=0.9, weight_decay=1e-4)
)
param_scheduler = [dict(type='CosineAnnealingLR', eta_min=0.0, by_epoch=True, T_max=max_epochs)]
auto_scale_lr = dict(enable=False, base_batch_size=256)
