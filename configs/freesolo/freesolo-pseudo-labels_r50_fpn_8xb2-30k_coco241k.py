"""Self-training: ``mim test`` of this writes what the reference finds as the next pseudo-labels."""

_base_ = './freesolo_r50_fpn_8xb2-30k_coco241k.py'

ann_file = 'work_dirs/freesolo/free_masks.json'
test_dataloader = dict(
    dataset=dict(data_root='', ann_file=ann_file, data_prefix=dict(img='data/coco/'))
)
test_evaluator = dict(
    _delete_=True,
    type='FreeSOLOPseudoLabels',
    ann_file=ann_file,
    out_file='work_dirs/freesolo/pseudo_labels_1.json',
    score_thr=0.3,
)
