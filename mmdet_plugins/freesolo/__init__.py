"""FreeSOLO: instance segmentation learnt from photographs alone.

Paper: Wang et al., "FreeSOLO: Learning to Segment Objects without Annotations", CVPR 2022; chapter
6 of Wang's thesis, whose equations, sections and tables the docstrings cite. Reference code:
NVlabs/FreeSOLO, for non-commercial use: constants and behaviour are taken from it, its code is not.

Deviations: the released code trains without the embeddings (its ``loss_embed`` is zero) and on two
views of each image, one with strong photometric changes and erased regions; the thesis has the
embeddings and copy-paste alone, and so has this unless asked (:class:`.FreeSOLOStrongView`). Losses
of masks are means over all cells of the batch, not over levels. Pairs of pixels are counted in the
box of a coarse mask, as in BoxInst; the released code leaves out rows and columns that the mask
does not touch.
"""

from ..common.location_head import SOLODiceLoss, SOLODynamicHead
from ..common.mask_postprocess import SOLOPostProcessor
from .datasets import FreeSOLODataset, FreeSOLOFewShotDataset
from .free_mask import FreeSOLOFreeMask
from .head import FreeSOLOHead
from .hooks import FreeSOLOTransferHook
from .label_store import (
    FreeSOLOImageDataset,
    FreeSOLOLoadImage,
    FreeSOLOPackImage,
    FreeSOLOPlannedBatches,
    FreeSOLOStoreHook,
    FreeSOLOStoreMetric,
)
from .losses import FreeSOLOWeakMaskLoss
from .preprocessor import FreeSOLODataPreprocessor
from .transforms import (
    FreeSOLOCopyPaste,
    FreeSOLOLoadAnnotations,
    FreeSOLOPackInputs,
    FreeSOLOStrongView,
)

__all__ = [
    'FreeSOLOCopyPaste',
    'FreeSOLODataPreprocessor',
    'FreeSOLODataset',
    'FreeSOLOFewShotDataset',
    'FreeSOLOFreeMask',
    'FreeSOLOHead',
    'FreeSOLOImageDataset',
    'FreeSOLOLoadAnnotations',
    'FreeSOLOLoadImage',
    'FreeSOLOPackImage',
    'FreeSOLOPackInputs',
    'FreeSOLOPlannedBatches',
    'FreeSOLOStoreHook',
    'FreeSOLOStoreMetric',
    'FreeSOLOStrongView',
    'FreeSOLOTransferHook',
    'FreeSOLOWeakMaskLoss',
    'SOLODiceLoss',
    'SOLODynamicHead',
    'SOLOPostProcessor',
]
