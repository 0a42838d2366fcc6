"""Table 5.3: Mask R-CNN on COCO, 12 epochs."""

_base_ = [
    './_base_/mask-rcnn_r50_fpn.py',
    '../../_base_/datasets/coco_instance_ms.py',
    'mmdet::_base_/schedules/schedule_1x.py',
    'mmdet::_base_/default_runtime.py',
]

optim_wrapper = dict(paramwise_cfg=dict(norm_decay_mult=0.0))
default_hooks = dict(checkpoint=dict(type='AtomicCheckpointHook'))
