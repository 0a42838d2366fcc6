"""Table 6.6: fine-tuned with all class labels and 10 % of COCO's masks."""

_base_ = [
    './_base_/freesolo-finetune_r50_fpn.py',
    './_base_/coco_few_shot.py',
    './_base_/schedule_90k.py',
    '../_base_/runtime_by_iter.py',
]

train_dataloader = dict(dataset=dict(limit='masks'))
