"""The reference with the deformable convolution last in its tower, as in the released code."""

_base_ = './cascade-rpn-dcn_r50_fpn_8xb2-1x_coco.py'

model = dict(rpn_head=dict(dcn_tower='last'))
