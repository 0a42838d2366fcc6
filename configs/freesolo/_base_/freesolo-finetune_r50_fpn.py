"""SOLOv2 with 80 classes, from FreeSOLO's weights (section 6.3.1)."""

_base_ = './freesolo_r50_fpn.py'

model = dict(
    data_preprocessor=dict(type='DetDataPreprocessor'),
    backbone=dict(init_cfg=None),
    mask_head=dict(num_classes=80, embed_dims=None, loss_mask=dict(type='SOLODiceLoss')),
)
custom_hooks = [
    dict(
        type='FreeSOLOTransferHook',
        checkpoint='work_dirs/freesolo_r50_fpn_8xb2-30k_coco241k/iter_30000.pth',
    )
]
