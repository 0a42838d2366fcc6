"""Table 6.6: fine-tuned with all class labels and 10 % of COCO's masks.

"The standard schedule" of 90k iterations is read as that of detectron2, drops at 60k and 80k.
"""

_base_ = './freesolo-finetune_r50_fpn_8xb2-20k_coco-10pct-images.py'

train_dataloader = dict(dataset=dict(limit='masks'))
train_cfg = dict(max_iters=90000)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=1000),
    dict(type='MultiStepLR', by_epoch=False, milestones=[60000, 80000], gamma=0.1),
]
