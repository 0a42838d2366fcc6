"""Cascade RPN with dual SimOTA, the proposal network of the UVO 2021 winner.

Paper: Du et al., 1st Place Solution for the UVO Challenge on Image-based Open-World Segmentation
2021, section 1.1; on top of Cascade RPN (Vu et al., NeurIPS 2019), SimOTA (Ge et al., YOLOX, 2021)
and CARAFE (Wang et al., ICCV 2019). Reference code: dulucas/UVO_Challenge, Track1/detection, which
has no licence: hyper-parameters and behaviour are taken from it, its code is not.

Where the two differ, the paper is the default and the released code an option (``dcn_tower``);
where the paper is silent, the released code is followed. Deviations stand in the docstrings of
``UVOCascadeRPNHead`` and of the configs. The detector around the head is mmdet's ``RPN``.
"""

from .assigner import UVOSimOTAAssigner
from .head import UVOCascadeRPNHead
from .neck import UVOCARAFEFPN
from .tta import UVODetTTAModel

__all__ = ['UVOCARAFEFPN', 'UVOCascadeRPNHead', 'UVODetTTAModel', 'UVOSimOTAAssigner']
