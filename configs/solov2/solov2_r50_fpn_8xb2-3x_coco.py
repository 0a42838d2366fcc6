"""SOLOv2, ResNet-50, 36 epochs: the reference of Tables 4.1 and 4.3 to 4.9."""

_base_ = [
    './_base_/imports.py',
    '../_base_/models/solov2_r50_fpn.py',
    '../_base_/datasets/coco_instance_ms.py',
    '../_base_/schedules/sgd_3x.py',
    'mmdet::_base_/default_runtime.py',
]

default_hooks = dict(checkpoint=dict(type='AtomicCheckpointHook'))
