"""mmdet's runtime for runs that are counted in iterations."""

_base_ = 'mmdet::_base_/default_runtime.py'

log_processor = dict(by_epoch=False)
default_hooks = dict(
    checkpoint=dict(type='AtomicCheckpointHook', by_epoch=False, interval=5000, max_keep_ckpts=2)
)
