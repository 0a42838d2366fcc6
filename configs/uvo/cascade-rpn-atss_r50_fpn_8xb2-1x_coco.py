"""Ablation: the reference with ATSS in both slots, top-k as a comment of the released code has."""

_base_ = './cascade-rpn-dcn_r50_fpn_8xb2-1x_coco.py'

model = dict(
    train_cfg=dict(
        rpn=dict(
            assigner=dict(_delete_=True, type='ATSSAssigner', topk=9),
            reg_assigner=dict(_delete_=True, type='ATSSAssigner', topk=21),
        )
    )
)
