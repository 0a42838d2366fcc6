"""Table 6.4: boxes of COCO 20k, 19 817 images of train2014.

Their file is cut out of train2014's by ``tools/convert/coco_subset.py``.
"""

_base_ = './freesolo_r50_fpn_8xb1-eval_coco.py'

ann_file = 'annotations/instances_coco20k.json'
test_dataloader = dict(dataset=dict(ann_file=ann_file, data_prefix=dict(img='train2014/')))
test_evaluator = dict(ann_file='data/coco/' + ann_file, metric='bbox')
