"""mmdet's runtime for a run of a few hundred iterations: all is counted in them."""

_base_ = 'mmdet::_base_/default_runtime.py'

log_processor = dict(by_epoch=False)
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(type='AtomicCheckpointHook', by_epoch=False, interval=100, max_keep_ckpts=1),
    memory_format=dict(type='ChannelsLastHook'),
)
