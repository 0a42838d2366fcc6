"""mmdet's SOLOv2, the peer of ``solov2_tiny_nuclei.py``: the same network, trained alike."""

_base_ = [
    './_base_/solov2-mmdet_tiny.py',
    '../../_base_/tiny/nuclei_instance.py',
    '../../_base_/tiny/demo_schedule.py',
    '../../_base_/tiny/runtime.py',
]

train_cfg = dict(max_iters=1200)
optim_wrapper = dict(optimizer=dict(lr=1e-3, fused=True))
