"""The light form with deformable convolutions in the backbone and last in the towers.

They are modulated, as in mmdet; the released code's are not.
"""

_base_ = './decoupled-solo-light_r50_fpn_8xb2-3x_coco.py'

model = dict(
    backbone=dict(
        dcn=dict(type='AnyDeviceDCNv2', deform_groups=1, fallback_on_stride=False),
        stage_with_dcn=(False, True, True, True),
    ),
    mask_head=dict(dcn='last'),
)
