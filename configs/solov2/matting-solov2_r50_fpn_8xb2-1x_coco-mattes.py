"""Section 4.3.4: matting from the weights of SOLOv2; the thesis gives no schedule."""

_base_ = [
    './_base_/matting_solov2_r50_fpn.py',
    '../_base_/datasets/coco_mattes.py',
    '../_base_/schedules/sgd_1x.py',
    'mmdet::_base_/default_runtime.py',
]

optim_wrapper = dict(optimizer=dict(lr=0.001))
load_from = 'work_dirs/solov2_r50_fpn_8xb2-3x_coco/epoch_36.pth'
default_hooks = dict(checkpoint=dict(type='AtomicCheckpointHook'))
