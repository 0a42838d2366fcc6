"""The segmenter of UVO 2021 at toy size: a small ResNet for Swin-L, 64x64 crops, random weights."""

_base_ = [
    '../_base_/box_crop_upernet_swinl.py',
    './_base_/demo_crops.py',
    '../../_base_/tiny/demo_schedule.py',
    '../../_base_/mmseg_runtime.py',
]
crop_size = {{_base_.crop_size}}

norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        _delete_=True,
        type='ResNet',
        depth=18,
        base_channels=32,
        stem_channels=32,
        norm_cfg=norm_cfg,
    ),
    decode_head=dict(
        in_channels=[32, 64, 128, 256], channels=32, dropout_ratio=0, norm_cfg=norm_cfg
    ),
    auxiliary_head=None,
)
log_processor = dict(by_epoch=False)
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=10, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='AtomicCheckpointHook', by_epoch=False, interval=100, max_keep_ckpts=1),
    sampler_seed=dict(type='DistSamplerSeedHook'),
)
