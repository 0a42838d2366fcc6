"""The reference: trained on coarse masks of Free Mask, iteration 0 of Table 6.7(c).

Iteration i + 1: write pseudo-labels by ``freesolo-pseudo-labels_r50_fpn_8xb8-infer_coco241k.py``,
and give them as ``train_dataloader.dataset.dataset.ann_file``.
"""

_base_ = [
    './_base_/freesolo_r50_fpn.py',
    './_base_/coco_pseudo_labels.py',
    './_base_/schedule_30k.py',
    '../_base_/runtime_by_iter.py',
]
