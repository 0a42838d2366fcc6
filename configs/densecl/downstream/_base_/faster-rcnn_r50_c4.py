"""Faster R-CNN C4 as MoCo's detection protocol has it (section 5.3.1; facebookresearch/moco).

Nothing is frozen, normalisation is synchronised and trained, and another layer of it follows res5.
"""

_base_ = 'mmdet::_base_/models/faster-rcnn_r50-caffe-c4.py'

custom_imports = dict(
    imports=[
        'mmdet_plugins.common.runtime',
        'mmdet_plugins.common.hooks',
        'mmdet_plugins.common.loops',
        'mmdet_plugins.densecl',
    ],
    allow_failed_imports=False,
)

norm_cfg = dict(type='SyncBN', requires_grad=True)
pretrained = dict(type='Pretrained', checkpoint='work_dirs/densecl_r50.pth')
model = dict(
    data_preprocessor=dict(
        mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True
    ),
    backbone=dict(
        frozen_stages=-1,
        norm_cfg=norm_cfg,
        norm_eval=False,
        style='pytorch',
        init_cfg=pretrained,
    ),
    roi_head=dict(
        shared_head=dict(
            type='DenseCLResLayer',
            norm_cfg=norm_cfg,
            norm_eval=False,
            style='pytorch',
            init_cfg=pretrained,
        ),
        bbox_head=dict(num_classes=20),
    ),
)
