"""Table 6.5: fine-tuned with 10 % of COCO's images."""

_base_ = [
    './_base_/freesolo_r50_fpn.py',
    './_base_/coco_few_shot.py',
    './_base_/schedule_finetune.py',
    'mmdet::_base_/default_runtime.py',
]

model = dict(
    data_preprocessor=dict(type='DetDataPreprocessor'),
    backbone=dict(init_cfg=None),
    mask_head=dict(
        num_classes=80,
        embed_dims=None,
        loss_mask=dict(type='SOLODiceLoss'),
    ),
)
custom_hooks = [
    dict(
        type='FreeSOLOTransferHook',
        checkpoint='work_dirs/freesolo_r50_fpn_8xb2-30k_coco241k/iter_30000.pth',
    )
]
