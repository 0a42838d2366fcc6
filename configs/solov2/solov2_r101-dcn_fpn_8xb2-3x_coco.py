"""Table 4.1: SOLOv2, ResNet-101, deformable convolutions in backbone and head.

That the head has them too, everywhere, is the released code's.
"""

_base_ = './solov2_r50_fpn_8xb2-3x_coco.py'

model = dict(
    backbone=dict(
        depth=101,
        dcn=dict(type='AnyDeviceDCNv2', deform_groups=1, fallback_on_stride=False),
        stage_with_dcn=(False, True, True, True),
        init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet101'),
    ),
    mask_head=dict(dcn='all', mask_features=dict(dcn=True)),
)
