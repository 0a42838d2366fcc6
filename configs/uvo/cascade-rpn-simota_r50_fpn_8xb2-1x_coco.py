"""Table 1, row 2 (+ SimOTA, IoU branch): without towers, CARAFE, the second sampler."""

_base_ = './cascade-rpn-dcn_r50_fpn_8xb2-1x_coco.py'

model = dict(
    neck=dict(
        _delete_=True, type='FPN', in_channels=[256, 512, 1024, 2048], out_channels=256, num_outs=5
    ),
    rpn_head=dict(num_tower_convs=0, dcn_tower=None),
    train_cfg=dict(rpn=dict(reg_assigner=None)),
)
