"""Tables 5.1 to 5.5: DenseCL on ImageNet, ResNet-50, 200 epochs."""

_base_ = [
    './_base_/densecl_r50.py',
    './_base_/two_views.py',
    './_base_/sgd_200e.py',
    'mmdet::_base_/default_runtime.py',
]

train_dataloader = dict(
    dataset=dict(data_root='data/imagenet/', data_prefix=dict(img='train/')),
)
default_hooks = dict(
    checkpoint=dict(type='AtomicCheckpointHook', interval=10, max_keep_ckpts=2),
)
