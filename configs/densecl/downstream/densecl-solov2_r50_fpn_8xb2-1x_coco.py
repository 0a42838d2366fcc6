"""Table 5.2: SOLOv2 on COCO, 12 epochs."""

_base_ = [
    '../../_base_/models/solov2_r50_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    '../../_base_/schedules/sgd_1x.py',
    'mmdet::_base_/default_runtime.py',
]

custom_imports = dict(
    imports=[
        'mmdet_plugins.common.runtime',
        'mmdet_plugins.common.hooks',
        'mmdet_plugins.common.location_head',
    ],
    allow_failed_imports=False,
)

model = dict(
    backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='work_dirs/densecl_r50.pth'))
)
default_hooks = dict(checkpoint=dict(type='AtomicCheckpointHook'))
