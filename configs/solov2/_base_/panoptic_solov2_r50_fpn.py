"""SOLOv2 with the semantic branch of Panoptic-FPN (thesis, section 4.3.3).

The thesis gives no numbers: branch, weight of its loss and thresholds of the merge are those of
Panoptic-FPN as Detectron2 and mmdet train it.
"""

_base_ = ['./imports.py', '../../_base_/models/solov2_r50_fpn.py']

model = dict(
    type='SOLOPanopticSegmentor',
    data_preprocessor=dict(pad_seg=True, seg_pad_value=255),
    semantic_head=dict(
        type='SOLOSemanticHead',
        num_things_classes=80,
        num_stuff_classes=53,
        in_channels=256,
        inner_channels=128,
        loss_seg=dict(
            type='CrossEntropyLoss', ignore_index=255, avg_non_ignore=True, loss_weight=0.5
        ),
    ),
    test_cfg=dict(
        # Lower scores neither enter the map nor change higher ones.
        score_thr=0.5,
        filter_thr=0.5,
        mask_format='dense',
        panoptic=dict(min_score=0.5, max_overlap=0.5, min_stuff_area=4096),
    ),
)
