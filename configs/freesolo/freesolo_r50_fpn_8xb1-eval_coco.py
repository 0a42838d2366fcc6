"""Tables 6.1 and 6.3: masks and boxes of COCO val2017, whatever their class."""

_base_ = [
    './_base_/freesolo_r50_fpn.py',
    './_base_/coco_eval.py',
    'mmdet::_base_/default_runtime.py',
]
