"""SOLO, Decoupled SOLO and SOLOv2: instance segmentation without boxes, by location.

Papers: Wang et al., "SOLO: Segmenting Objects by Locations", ECCV 2020 and TPAMI 2021; "SOLOv2:
Dynamic and Fast Instance Segmentation", NeurIPS 2020; both as chapters 3 and 4 of Wang's thesis,
whose equations, sections and tables the docstrings cite. Reference code: WXinlong/SOLO, for
non-commercial use: settings and behaviour are taken from it, its code is not.

mmdet ships the same three methods. Parameters here carry the same names, so that its checkpoints
load, and losses and detections agree with it. What differs: targets are formed where the masks are,
once an object; only positive and candidate cells get a kernel and a mask; on a CPU, towers take all
levels at once; masks leave as run lengths, with their boxes; kernels may be 3x3; every ablation of
the thesis is an option. Matrix NMS multiplies by sigma where the thesis divides, as all released
code does. The detector around the heads is mmdet's; on a CPU it orders images channels-last.
Panoptic segmentation and matting of instances have no released code; they stand in their own files.
"""

from ..common.location_head import SOLODiceLoss, SOLODynamicHead
from ..common.mask_postprocess import SOLOPostProcessor
from .datasets import SOLOLoadPanopticAnnotations, SOLOLVISDataset
from .head import SOLODecoupledHead, SOLOVanillaHead
from .losses import SOLOMaskBCELoss, SOLOMaskFocalLoss
from .matting import SOLOMattingHead, SOLOMattingSegmentor
from .matting_data import (
    SOLOLoadMattes,
    SOLOMatteDataset,
    SOLOMattingMetric,
    SOLOPasteMattes,
)
from .metrics import SOLOCocoMetric, SOLOLVISMetric, SOLOPanopticMetric
from .network import SOLOMergeNeck, SOLOSeparateMaskFeatures
from .panoptic import SOLOPanopticSegmentor, SOLOSemanticHead

__all__ = [
    'SOLOCocoMetric',
    'SOLODecoupledHead',
    'SOLODiceLoss',
    'SOLODynamicHead',
    'SOLOLVISDataset',
    'SOLOLVISMetric',
    'SOLOLoadMattes',
    'SOLOLoadPanopticAnnotations',
    'SOLOMaskBCELoss',
    'SOLOMaskFocalLoss',
    'SOLOMatteDataset',
    'SOLOMattingHead',
    'SOLOMattingMetric',
    'SOLOMattingSegmentor',
    'SOLOMergeNeck',
    'SOLOPanopticMetric',
    'SOLOPanopticSegmentor',
    'SOLOPasteMattes',
    'SOLOPostProcessor',
    'SOLOSemanticHead',
    'SOLOSeparateMaskFeatures',
    'SOLOVanillaHead',
]
