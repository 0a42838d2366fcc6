"""mmdet's SOLOv2, the peer of ``solov2_tiny_demo.py``: the same network, trained alike."""

_base_ = [
    './_base_/solov2-mmdet_tiny.py',
    '../../_base_/tiny/demo_instance.py',
    '../../_base_/tiny/demo_schedule.py',
    'mmdet::_base_/default_runtime.py',
]

train_cfg = dict(max_iters=1200)
optim_wrapper = dict(optimizer=dict(lr=1e-3, fused=True))
log_processor = dict(by_epoch=False)
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(type='AtomicCheckpointHook', by_epoch=False, interval=100, max_keep_ckpts=1),
)
