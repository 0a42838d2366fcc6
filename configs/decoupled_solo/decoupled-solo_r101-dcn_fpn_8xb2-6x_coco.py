"""Table 3.1: Decoupled SOLO, ResNet-101 with deformable convolutions, 72 epochs.

They are modulated; the thesis cites the unmodulated ones.
"""

_base_ = './decoupled-solo_r101_fpn_8xb2-6x_coco.py'

model = dict(
    backbone=dict(
        dcn=dict(type='AnyDeviceDCNv2', deform_groups=1, fallback_on_stride=False),
        stage_with_dcn=(False, True, True, True),
    )
)
