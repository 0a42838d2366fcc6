"""Table 4.10: panoptic SOLOv2, ResNet-50; 36 epochs, as the thesis does not say how many."""

_base_ = [
    './_base_/panoptic_solov2_r50_fpn.py',
    '../_base_/datasets/coco_panoptic_ms.py',
    '../_base_/schedules/sgd_3x.py',
    'mmdet::_base_/default_runtime.py',
]

default_hooks = dict(checkpoint=dict(type='AtomicCheckpointHook'))
