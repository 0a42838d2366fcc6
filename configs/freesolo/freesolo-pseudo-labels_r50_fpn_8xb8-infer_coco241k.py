"""Self-training: ``mim test`` of this writes what the reference finds as the next pseudo-labels."""

_base_ = [
    './_base_/freesolo_r50_fpn.py',
    './_base_/unlabeled_coco.py',
    'mmdet::_base_/default_runtime.py',
]

test_dataloader = dict(batch_size=8)
test_evaluator = dict(score_thr=0.3)
custom_hooks = [dict(type='FreeSOLOStoreHook', folder='work_dirs/freesolo_labels_1/')]
