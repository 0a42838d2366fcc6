"""Decoupled SOLO with ResNet-50 and FPN (thesis, section 3.4): SOLO with another mask branch."""

_base_ = '../../solo/_base_/solo_r50_fpn.py'

model = dict(mask_head=dict(type='SOLODecoupledHead'))
