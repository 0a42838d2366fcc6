"""Table 4.7, speed first: two convolutions in the towers, shorter side 448 px.

128 mask feature channels, 256 in the towers and the scale ranges are the released code's.
"""

_base_ = [
    './_base_/imports.py',
    '../_base_/models/solov2_r50_fpn.py',
    '../_base_/datasets/coco_instance_ms448.py',
    '../_base_/schedules/sgd_3x.py',
    'mmdet::_base_/default_runtime.py',
]

model = dict(
    mask_head=dict(
        feat_channels=256,
        stacked_convs=2,
        mask_features=dict(out_channels=128),
        scale_ranges=[(1, 56), (28, 112), (56, 224), (112, 448), (224, 896)],
    )
)
default_hooks = dict(checkpoint=dict(type='AtomicCheckpointHook'))
