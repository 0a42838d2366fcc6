"""Table 6.6: fine-tuned with all class labels and 5 % of COCO's masks."""

_base_ = './freesolo-finetune_r50_fpn_8xb2-90k_coco-10pct-masks.py'

train_dataloader = dict(dataset=dict(fraction=0.05))
