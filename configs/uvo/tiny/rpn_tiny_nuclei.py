"""mmdet's RPN R50-FPN from random weights, the peer of ``cascade-rpn_tiny_nuclei.py``.

Stock but for the anchors, which are half as large as usual, as the other side's are: nuclei are.
"""

_base_ = [
    '../_base_/rpn_r50_fpn.py',
    '../../_base_/tiny/nuclei_detection.py',
    '../../_base_/tiny/demo_schedule.py',
    '../../_base_/tiny/runtime.py',
]

model = dict(
    backbone=dict(frozen_stages=-1, norm_eval=False, init_cfg=None),
    rpn_head=dict(anchor_generator=dict(scales=[4])),
    test_cfg=dict(rpn=dict(nms_pre=1000, max_per_img=1000)),
)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
default_hooks = dict(checkpoint=dict(interval=50))
