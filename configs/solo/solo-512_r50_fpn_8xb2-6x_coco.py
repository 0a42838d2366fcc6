"""Table 3.6: SOLO-512, ResNet-50. Scales and ranges are those of Decoupled SOLO light."""

_base_ = [
    './_base_/solo_r50_fpn.py',
    '../_base_/datasets/coco_instance_ms512.py',
    '../_base_/schedules/sgd_6x.py',
    'mmdet::_base_/default_runtime.py',
]

model = dict(mask_head=dict(scale_ranges=[(1, 64), (32, 128), (64, 256), (128, 512), (256, 2048)]))
default_hooks = dict(checkpoint=dict(type='AtomicCheckpointHook'))
