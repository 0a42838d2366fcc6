"""SOLOv2 with details refinement: mattes of instances (thesis, section 4.3.4).

The thesis gives no weight of the matte's loss; 10 is ours.
"""

_base_ = ['./imports.py', '../../_base_/models/solov2_r50_fpn.py']

model = dict(
    type='SOLOMattingSegmentor',
    mask_head=dict(
        type='SOLOMattingHead',
        loss_matte_weight=10.0,
        freeze_categories=True,
        refinement=dict(feat_channels=32),
    ),
    test_cfg=dict(score_thr=0.3, filter_thr=0.3, max_per_img=20),
)
