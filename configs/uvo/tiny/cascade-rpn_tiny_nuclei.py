"""The detector of UVO 2021 with a whole ResNet-50 and narrow heads, from random weights.

Compared with ``rpn_tiny_nuclei.py``: same data, iterations, batch, optimiser, random weights, and
nothing frozen. Heads are narrow so that an iteration costs about what one of the RPN does.
"""

_base_ = [
    '../_base_/cascade_rpn_r50_fpn.py',
    '../../_base_/tiny/nuclei_detection.py',
    '../../_base_/tiny/demo_schedule.py',
    '../../_base_/tiny/runtime.py',
]

model = dict(
    backbone=dict(frozen_stages=-1, norm_eval=False, init_cfg=None),
    neck=dict(out_channels=64, upsample_cfg=dict(compressed_channels=16)),
    rpn_head=dict(
        in_channels=64,
        feat_channels=64,
        anchor_scale=4,
        num_tower_convs=2,
        dcn_tower=None,
        norm_cfg=dict(num_groups=8),
    ),
    test_cfg=dict(rpn=dict(nms_pre=1000, max_per_img=1000)),
)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
default_hooks = dict(checkpoint=dict(interval=50))
