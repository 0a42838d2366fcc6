"""Table 5.5: FCN on Cityscapes."""

_base_ = [
    './_base_/fcn_r50-d8.py',
    './_base_/cityscapes_769.py',
    './_base_/poly_40k.py',
    '../../_base_/mmseg_runtime.py',
]

model = dict(
    data_preprocessor=dict(size=(769, 769)),
    decode_head=dict(align_corners=True),
    auxiliary_head=dict(align_corners=True),
    test_cfg=dict(mode='slide', crop_size=(769, 769), stride=(513, 513)),
)
