"""Table 5.2: SOLOv2 on COCO, 12 epochs."""

_base_ = [
    './_base_/solov2_r50_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    '../../_base_/schedules/sgd_1x.py',
    'mmdet::_base_/default_runtime.py',
]

default_hooks = dict(checkpoint=dict(type='AtomicCheckpointHook'))
