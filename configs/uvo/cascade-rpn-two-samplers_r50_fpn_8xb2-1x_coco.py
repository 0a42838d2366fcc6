"""Table 1, row 4 (+ two samplers): without deformable towers and CARAFE."""

_base_ = './cascade-rpn-dcn_r50_fpn_8xb2-1x_coco.py'

model = dict(
    neck=dict(
        _delete_=True, type='FPN', in_channels=[256, 512, 1024, 2048], out_channels=256, num_outs=5
    ),
    rpn_head=dict(dcn_tower=None),
)
