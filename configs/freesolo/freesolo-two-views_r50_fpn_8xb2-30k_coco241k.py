"""The reference on two views of each image, one changed strongly, as the released code trains."""

_base_ = './freesolo_r50_fpn_8xb2-30k_coco241k.py'

train_dataloader = dict(dataset=dict(pipeline=[dict(type='FreeSOLOTwoViews')]))
