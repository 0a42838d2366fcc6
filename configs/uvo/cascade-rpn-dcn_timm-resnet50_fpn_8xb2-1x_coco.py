"""The reference with a backbone from timm by its name."""

_base_ = './cascade-rpn-dcn_r50_fpn_8xb2-1x_coco.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='TimmBackbone',
        model_name='resnet50.a1_in1k',
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint='timm://'),
    )
)
