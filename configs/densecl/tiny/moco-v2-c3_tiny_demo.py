"""MoCo-v2, the baseline of ``densecl-c3_tiny_demo.py``: the same network, trained alike."""

_base_ = './densecl-c3_tiny_demo.py'

model = dict(dense_weight=0.0)
