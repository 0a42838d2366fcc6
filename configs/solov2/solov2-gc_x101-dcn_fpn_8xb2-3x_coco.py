"""The SOLOv2 of the 3D-FUTURE 2020 winners: ResNeXt-101 with deformable convolutions and GC blocks.

"Towards Fine-grained Large Object Segmentation: 1st Place Solution to 3D AI Challenge 2020 -
Instance Segmentation Track", section 3.2, gives the backbone and nothing else: ratio and place of
the context blocks are those of GCNet, the rest as in ``solov2_r101-dcn_fpn_8xb2-3x_coco.py``.
"""

_base_ = './solov2_r50_fpn_8xb2-3x_coco.py'

model = dict(
    backbone=dict(
        type='ResNeXt',
        depth=101,
        groups=64,
        base_width=4,
        dcn=dict(type='AnyDeviceDCNv2', deform_groups=1, fallback_on_stride=False),
        stage_with_dcn=(False, True, True, True),
        plugins=[
            dict(
                cfg=dict(type='ContextBlock', ratio=1 / 16),
                stages=(False, True, True, True),
                position='after_conv3',
            )
        ],
        init_cfg=dict(type='Pretrained', checkpoint='open-mmlab://resnext101_64x4d'),
    ),
    mask_head=dict(dcn='all', mask_features=dict(dcn=True)),
)
