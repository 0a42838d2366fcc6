"""Table 5.4: Mask R-CNN on a tenth of COCO's images, 90k iterations.

Which tenth is not published; here it is the first 11,727 of the 117,266 images with objects, in the
order of the file, which is a random one.
"""

_base_ = [
    './_base_/mask-rcnn_r50_fpn.py',
    '../../_base_/datasets/coco_instance_ms.py',
    '../../_base_/runtime_by_iter.py',
]

train_dataloader = dict(
    sampler=dict(type='InfiniteSampler', shuffle=True), dataset=dict(indices=11727)
)
train_cfg = dict(type='ResumableIterBasedTrainLoop', max_iters=90000, val_interval=10000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type='MultiStepLR', by_epoch=False, milestones=[60000, 80000], gamma=0.1),
]
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=0.02, momentum=0.9, weight_decay=1e-4),
    paramwise_cfg=dict(norm_decay_mult=0.0),
)
auto_scale_lr = dict(enable=False, base_batch_size=16)
