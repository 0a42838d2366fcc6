"""Decoupled SOLO at toy size: from random weights to useful masks in minutes on a CPU."""

_base_ = '../../solo/tiny/solo_tiny_demo.py'

model = dict(mask_head=dict(type='SOLODecoupledHead'))
train_cfg = dict(max_iters=1300)
