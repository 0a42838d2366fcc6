"""Table 5.6, lambda = 1.0*: the dense term alone, after 10k iterations of the global one."""

_base_ = './densecl_r50_c5_8xb32-800e_coco.py'

model = dict(dense_weight=1.0)
custom_hooks = [
    dict(type='DenseCLQueueSizeHook'),
    dict(type='DenseCLWarmupHook', iters=10000),
]
