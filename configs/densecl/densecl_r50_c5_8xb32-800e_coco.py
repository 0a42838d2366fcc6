"""Tables 5.1 to 5.9: DenseCL on COCO, ResNet-50, 800 epochs."""

_base_ = [
    './_base_/densecl_r50.py',
    './_base_/two_views.py',
    './_base_/sgd_800e.py',
    'mmdet::_base_/default_runtime.py',
]

train_dataloader = dict(
    dataset=dict(data_root='data/coco/', data_prefix=dict(img='train2017/')),
)
default_hooks = dict(
    checkpoint=dict(type='AtomicCheckpointHook', interval=10, max_keep_ckpts=2),
)
