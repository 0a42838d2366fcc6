"""From category maps and mask maps to instances with masks, boxes and scores (section 3.2.4).

Shapes: L levels, S cells a side of a level's grid, P cells of all levels, K classes, C candidates,
n instances, ``h w`` a mask map, ``H W`` the returned masks.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from mmdet.registry import TASK_UTILS
from mmengine.structures import InstanceData
from torch import Tensor

from mmdet_plugins.ops.instance_masks import Frame, resize_masks, select_instances


def grid_scores(cls_logits: Sequence[Tensor]) -> Tensor:
    """Class probabilities [P, K] from L maps [K, S, S]; all but local maxima are zero.

    A maximum is one among its cell and the cells above, to the left, and above to the left ("points
    NMS" of the released code).
    """
    flat = []
    for logits in cls_logits:
        scores = logits.sigmoid()
        peaks = F.max_pool2d(scores[None], 2, stride=1, padding=1)[0, :, :-1, :-1]
        flat.append((scores * (peaks == scores)).flatten(1))
    return torch.cat(flat, 1).T


@TASK_UTILS.register_module()
class SOLOPostProcessor:
    """Threshold, maskness, NMS on masks, resizing: mmdet's results at a fraction of the memory.

    mmdet's heads form a mask for every score above the threshold before they keep ``nms_pre``,
    return empty boxes, and leave the run lengths to be made one by one on the host.

    Args:
        score_thr: Class scores above it make candidates.
        mask_thr: Probability above which a pixel belongs to the mask.
        maskness: Multiply scores by the mean probability over the mask (section 3.2.4).
        nms_pre: How many candidates enter the NMS, by score.
        nms: ``'matrix'``, ``'hard'``, ``'soft'`` or ``'fast'`` (Table 4.6).
        kernel: Decay of Matrix and Soft-NMS, ``'gaussian'`` or ``'linear'``.
        sigma: Of the Gaussian; it multiplies, where the thesis divides.
        iou_thr: Of Hard-, Soft- and Fast-NMS.
        filter_thr: Scores after NMS below it are dropped.
        max_per_img: Instances returned at most.
        mask_format: ``'rle'`` for COCO's run lengths, which all metrics here and mmdet's take, or
            ``'dense'`` for a bool tensor, which drawing needs.
        byte_budget: Memory for mask maps in the making.
    """

    def __init__(
        self,
        score_thr: float = 0.1,
        mask_thr: float = 0.5,
        maskness: bool = True,
        nms_pre: int = 500,
        nms: str = 'matrix',
        kernel: str = 'gaussian',
        sigma: float = 2.0,
        iou_thr: float = 0.5,
        filter_thr: float = 0.05,
        max_per_img: int = 100,
        mask_format: str = 'rle',
        byte_budget: int = 64 << 20,
    ) -> None:
        if mask_format not in ('rle', 'dense'):
            raise ValueError(f"mask_format must be 'rle' or 'dense', not {mask_format!r}")
        self.score_thr = score_thr
        self.mask_format = mask_format
        self.selection = dict(
            mask_thr=mask_thr,
            maskness=maskness,
            nms_pre=nms_pre,
            method=nms,
            kernel=kernel,
            sigma=sigma,
            iou_thr=iou_thr,
            filter_thr=filter_thr,
            max_num=max_per_img,
            byte_budget=byte_budget,
        )

    def __call__(
        self,
        scores: Tensor,
        min_area: Tensor,
        maps_of: Callable[[Tensor], Tensor],
        frame: Frame,
        logits: bool,
    ) -> InstanceData:
        """Instances of one image.

        Args:
            scores: [P, K], of :func:`grid_scores`.
            min_area: [P], pixels of its map that a mask must exceed.
            maps_of: Gives the maps [C, h, w] of some cells ([C], in P).
            frame: The sizes of maps, input, image and result.
            logits: The maps are logits, not probabilities.

        Returns:
            ``scores`` [n], ``labels`` [n], ``bboxes`` [n, 4] and ``masks``.
        """
        cells, labels = (scores > self.score_thr).nonzero(as_tuple=True)
