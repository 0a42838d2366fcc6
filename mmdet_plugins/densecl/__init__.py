"""DenseCL: pre-training of a backbone on images without labels, by dense contrast.

Paper: Wang et al., "Dense Contrastive Learning for Self-Supervised Visual Pre-Training", CVPR 2021,
as chapter 5 of Wang's thesis, whose equations, sections and tables the docstrings cite. Reference
code: WXinlong/DenseCL; it decides where the thesis is silent (which vectors are pooled, order of
the updates, initialisation of the heads). MoCo-v2 is the same model with ``dense_weight=0``.

Deviations: the logits of queries and queue exist nowhere (``ops/contrastive.py``); shuffling BN
exchanges each sample with one other rank instead of gathering all images and all backbone features
on every rank, and does nothing where there is one rank; a model built without the dense term never
computes its branch. As released, queries come from the first view and keys from the second, not the
other way round as well.
"""

from .hooks import DenseCLQueueSizeHook, DenseCLWarmupHook
from .metrics import DenseCLCorrespondence
from .model import DenseCL, DenseCLDataPreprocessor, DenseCLHead
from .res_layer import DenseCLResLayer
from .transforms import DenseCLTwoViews

__all__ = [
    'DenseCL',
    'DenseCLCorrespondence',
    'DenseCLDataPreprocessor',
    'DenseCLHead',
    'DenseCLQueueSizeHook',
    'DenseCLResLayer',
    'DenseCLTwoViews',
    'DenseCLWarmupHook',
]
