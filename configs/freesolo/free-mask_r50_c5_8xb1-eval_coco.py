"""Coarse masks of COCO val2017 scored: Table 6.7(a) and (b), and iteration -1 of (c)."""

_base_ = [
    './_base_/free-mask_r50.py',
    './_base_/coco_eval.py',
    'mmdet::_base_/default_runtime.py',
]
