"""Table 6.4: boxes of VOC 2007 trainval; difficult objects count neither way.

Their file is made by ``tools/convert/voc_to_coco.py --boxes``.
"""

_base_ = './freesolo_r50_fpn_8xb1-eval_coco.py'

data_root = 'data/VOCdevkit/VOC2007/'
ann_file = 'annotations/boxes_trainval.json'
test_dataloader = dict(
    dataset=dict(data_root=data_root, ann_file=ann_file, data_prefix=dict(img='JPEGImages/'))
)
test_evaluator = dict(ann_file=data_root + ann_file, metric='bbox')
