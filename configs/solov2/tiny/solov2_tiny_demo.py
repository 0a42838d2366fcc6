"""SOLOv2 at toy size: from random weights to useful masks in minutes on a CPU."""

_base_ = [
    './_base_/solov2_tiny.py',
    '../../_base_/tiny/demo_instance.py',
    '../../_base_/tiny/demo_schedule.py',
    '../../_base_/tiny/runtime.py',
]

train_cfg = dict(max_iters=1200)
optim_wrapper = dict(optimizer=dict(lr=1e-3, fused=True))
