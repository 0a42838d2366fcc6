"""Table 5.2: SOLOv2 on COCO, 12 epochs."""

_base_ = '../../solov2/solov2_r50_fpn_8xb2-1x_coco.py'

model = dict(
    backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='work_dirs/densecl_r50.pth'))
)
