"""Table 3.2: SOLO without a pyramid, on C3 to C5 merged at stride 8; grids of 12, 24 and 36."""

_base_ = './solo_r50_fpn_8xb2-3x_coco.py'

model = dict(
    backbone=dict(out_indices=(1, 2, 3)),
    neck=dict(_delete_=True, type='SOLOMergeNeck', in_channels=[512, 1024, 2048], out_channels=256),
    mask_head=dict(num_grids=[24], in_strides=[8], strides=[8], scale_ranges=[(1, 2048)]),
)
