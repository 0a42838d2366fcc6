"""Table 4.7, accuracy first: three convolutions in the towers, shorter side 512 px.

Deformable convolutions in the backbone and last in the towers, modulated as in mmdet, where the
released code's are not. 128 mask feature channels, 256 in
the towers and the scale ranges are the released code's.
"""

_base_ = [
    './_base_/imports.py',
    '../_base_/models/solov2_r50_fpn.py',
    '../_base_/datasets/coco_instance_ms512.py',
    '../_base_/schedules/sgd_3x.py',
    'mmdet::_base_/default_runtime.py',
]

model = dict(
    backbone=dict(
        dcn=dict(type='AnyDeviceDCNv2', deform_groups=1, fallback_on_stride=False),
        stage_with_dcn=(False, True, True, True),
    ),
    mask_head=dict(
        feat_channels=256,
        stacked_convs=3,
        dcn='last',
        mask_features=dict(out_channels=128),
        scale_ranges=[(1, 64), (32, 128), (64, 256), (128, 512), (256, 2048)],
    ),
)
default_hooks = dict(checkpoint=dict(type='AtomicCheckpointHook'))
