"""Table 6.5: fine-tuned with 10 % of COCO's images."""

_base_ = [
    './_base_/freesolo-finetune_r50_fpn.py',
    './_base_/coco_few_shot.py',
    './_base_/schedule_20k.py',
    '../_base_/runtime_by_iter.py',
]
