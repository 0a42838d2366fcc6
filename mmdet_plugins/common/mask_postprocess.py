"""From category maps and mask maps to instances with masks, boxes and scores (section 3.2.4).

Shapes: L levels, S cells a side of a level's grid, P cells of all levels, K classes, C candidates,
n instances, ``h w`` a mask map, ``H W`` the returned masks.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from mmdet.registry import TASK_UTILS
from mmengine.structures import InstanceData
from torch import Tensor

from ..ops.instance_masks import (
    BYTE_BUDGET,
    Frame,
    resize_instances,
    select_by_nms,
    select_instances,
)
from ..ops.matrix_nms import METHODS
from ..ops.rle import decode_rle


def grid_scores(cls_logits: Sequence[Tensor]) -> Tensor:
    """Class probabilities [..., P, K] from L maps [..., K, S, S]; all but local maxima are zero.

    A maximum is one among its cell and the cells above, to the left, and above to the left ("points
    NMS" of the released code).
    """
    flat = []
    for logits in cls_logits:
        scores = logits.sigmoid()
        peaks = F.max_pool2d(scores, 2, stride=1, padding=1)[..., :-1, :-1]
        flat.append((scores * (peaks == scores)).flatten(-2))
    return torch.cat(flat, -1).transpose(-1, -2)


class EncodedMasks(list):
    """COCO run lengths of an image's masks, which metrics take as they are and mmdet can draw.

    mmdet's visualizer selects instances by score and turns what is no tensor into an array.
    """

    def __getitem__(self, index):
        found = super().__getitem__(index)
        return EncodedMasks(found) if isinstance(index, slice) else found

    def __add__(self, other: list) -> 'EncodedMasks':
        return EncodedMasks([*self, *other])

    def astype(self, dtype) -> np.ndarray:
        """[n, H, W]; [0, 0, 0] without masks."""
        return decode_rle(self).astype(dtype)


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
        mask_format: ``'rle'`` for COCO's run lengths (:class:`EncodedMasks`), ``'dense'`` for a
            bool tensor, which mmdet's ``DetInferencer`` needs.
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
        byte_budget: int = BYTE_BUDGET,
    ) -> None:
        if mask_format not in ('rle', 'dense'):
            raise ValueError(f"mask_format must be 'rle' or 'dense', not {mask_format!r}")
        if nms not in METHODS:
            raise ValueError(f'nms must be one of {", ".join(METHODS)}, not {nms!r}')
        self.score_thr = score_thr
        self.rle = mask_format == 'rle'
        self.maskness = maskness
        self.maps = dict(mask_thr=mask_thr, byte_budget=byte_budget)
        self.suppression = dict(
            kernel=kernel,
            sigma=sigma,
            filter_thr=filter_thr,
            nms_pre=nms_pre,
            max_num=max_per_img,
        )
        self.nms = dict(method=nms, iou_thr=iou_thr)

    @torch.no_grad()
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
            ``scores`` [n], ``labels`` [n], ``bboxes`` [n, 4], ``masks``, and ``cells`` [n], in P,
            from which they come.
        """
        cells, labels = (scores > self.score_thr).nonzero(as_tuple=True)
        maps = dict(maps_of=lambda index: maps_of(cells[index]), logits=logits, **self.maps)
        candidates = dict(
            scores=scores[cells, labels],
            labels=labels,
            min_area=min_area[cells],
            map_hw=frame.map_hw,
        )
        if self.nms['method'] == 'matrix' and self.maskness:
            selection = select_instances(**candidates, **maps, **self.suppression)
        else:
            selection = select_by_nms(
                **candidates, **maps, maskness=self.maskness, **self.nms, **self.suppression
            )
        instances = resize_instances(selection, frame=frame, rle=self.rle, **maps)
        return InstanceData(
            bboxes=instances.boxes_xyxy,
            scores=selection.scores,
            labels=selection.labels,
            masks=EncodedMasks(instances.masks) if self.rle else instances.masks,
            cells=cells[selection.index],
        )
