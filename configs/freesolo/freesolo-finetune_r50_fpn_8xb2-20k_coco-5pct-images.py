"""Table 6.5: fine-tuned with 5 % of COCO's images."""

_base_ = './freesolo-finetune_r50_fpn_8xb2-20k_coco-10pct-images.py'

train_dataloader = dict(dataset=dict(fraction=0.05))
