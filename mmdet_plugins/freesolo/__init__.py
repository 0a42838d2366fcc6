"""FreeSOLO: instance segmentation learnt from images without labels.

Paper: Wang et al., "FreeSOLO: Learning to Segment Objects without Annotations", CVPR 2022; chapter
6 of Wang's thesis, whose equations, sections and tables the docstrings cite. Reference code:
NVlabs/FreeSOLO, for non-commercial use: settings and behaviour are taken from it, its code is not.
"""

from .free_mask import FreeSOLOFreeMask
from .label_store import (
    FreeSOLOImageDataset,
    FreeSOLOLoadImage,
    FreeSOLOPlannedBatches,
    FreeSOLOStoreHook,
    FreeSOLOStoreMetric,
)

__all__ = [
    'FreeSOLOFreeMask',
    'FreeSOLOImageDataset',
    'FreeSOLOLoadImage',
    'FreeSOLOPlannedBatches',
    'FreeSOLOStoreHook',
    'FreeSOLOStoreMetric',
]
