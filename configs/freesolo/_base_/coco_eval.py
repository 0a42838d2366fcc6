"""COCO val2017 without its classes, to be tested on; masks and boxes, AR at 1, 10 and 100."""

_base_ = '../../_base_/datasets/coco_open_world.py'

train_dataloader = None
val_dataloader = None
val_evaluator = None
test_cfg = dict(type='TestLoop')
test_evaluator = dict(metric=['segm', 'bbox'], max_dets=[1, 10, 100])
