"""SOLOv2, ResNet-50, on LVIS v1, as on v0.5 in Table 4.2."""

_base_ = [
    './_base_/imports.py',
    '../_base_/models/solov2_r50_fpn.py',
    'mmdet::_base_/datasets/lvis_v1_instance.py',
    '../_base_/schedules/sgd_3x.py',
    'mmdet::_base_/default_runtime.py',
]

model = dict(mask_head=dict(num_classes=1203), test_cfg=dict(max_per_img=300))

train_dataloader = dict(dataset=dict(dataset=dict(type='SOLOLVISDataset')))
val_dataloader = dict(dataset=dict(type='SOLOLVISDataset'))
test_dataloader = val_dataloader

val_evaluator = dict(type='SOLOLVISMetric')
test_evaluator = val_evaluator

default_hooks = dict(checkpoint=dict(type='AtomicCheckpointHook'))
