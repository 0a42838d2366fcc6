"""Table 1, row 5 (+ CARAFE): the reference without deformable towers."""

_base_ = './cascade-rpn-dcn_r50_fpn_8xb2-1x_coco.py'

model = dict(rpn_head=dict(dcn_tower=None))
