"""Table 5.5: FCN on VOC train_aug2012, tested on val2012."""

_base_ = [
    './_base_/fcn_r50-d8.py',
    './_base_/voc12_aug_512.py',
    './_base_/poly_20k.py',
    '../../_base_/mmseg_runtime.py',
]

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    decode_head=dict(num_classes=21),
    auxiliary_head=dict(num_classes=21),
)
