"""Table 1, row 1 (+ Cascade RPN): mmdet's network and assigners, with focal and GIoU loss."""

_base_ = './cascade-rpn-dcn_r50_fpn_8xb2-1x_coco.py'

model = dict(
    neck=dict(
        _delete_=True, type='FPN', in_channels=[256, 512, 1024, 2048], out_channels=256, num_outs=5
    ),
    rpn_head=dict(num_tower_convs=0, dcn_tower=None, loss_iou=None),
    train_cfg=dict(
        rpn=[
            dict(assigner=dict(type='RegionAssigner', center_ratio=0.2, ignore_ratio=0.5)),
            dict(
                assigner=dict(
                    type='MaxIoUAssigner', pos_iou_thr=0.7, neg_iou_thr=0.7, min_pos_iou=0.3
                )
            ),
        ]
    ),
)
