"""Ablation: the reference with mmdet's RPN assigner for both branches."""

_base_ = './cascade-rpn-dcn_r50_fpn_8xb2-1x_coco.py'

model = dict(
    train_cfg=dict(
        rpn=dict(
            assigner=dict(
                _delete_=True,
                type='MaxIoUAssigner',
                pos_iou_thr=0.7,
                neg_iou_thr=0.3,
                min_pos_iou=0.3,
            ),
            reg_assigner=None,
        )
    )
)
