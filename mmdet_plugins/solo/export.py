"""SOLOv2 as one graph of plain operators, from pixels to instances, for ``torch.onnx.export``.

The values are those of the detector's ``predict``: selection is exact, its loops over images and
chunks of candidates are unrolled into batches. The graph makes as many maps an image as the image
of the batch with the most scores above the threshold needs.

Shapes: N images, ``H W`` their size, P cells of all levels, K classes, C candidates an image,
n instances an image (``max_per_img``), ``h w`` the mask map.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from mmcv.ops import DeformConv2d, ModulatedDeformConv2d
from torch import Tensor, nn

from ..common.deform import AnyDeviceDCNv2, AnyDeviceDeformConv2d, is_plain
from ..common.location_head import SOLODynamicHead, flatten_grids
from ..common.mask_postprocess import SOLOPostProcessor, grid_scores
from ..ops.instance_masks import mask_boxes
from ..ops.matrix_nms import matrix_decay


class BatchInstances(NamedTuple):
    """The instances of N images by falling score, n rows each, zeros behind the last one."""

    boxes: Tensor
    """float32 [N, n, 4], x1 y1 x2 y2 in pixels of the input, right and bottom exclusive."""
    scores: Tensor
    """float32 [N, n]."""
    labels: Tensor
    """int64 [N, n]; -1 behind the last instance."""
    masks: Tensor
    """bool [N, n, H, W]."""
    num_instances: Tensor
    """int64 [N], how many of the n rows are instances."""


class ExportableSOLOv2(nn.Module):
    """A SOLOv2 detector with preprocessing and post-processing in the graph.

    Args:
        detector: With a :class:`SOLODynamicHead`, in any mode.
        max_candidates: Scores, by rank, that get a mask at most; all above the threshold by
            default. With less, a mask that maskness would have lifted into the ``nms_pre`` best is
            missed; the memory for mask maps is bounded.

    Raises:
        ValueError: The detector has a part that is not exported.
    """

    def __init__(self, detector: nn.Module, max_candidates: int | None = None) -> None:
        super().__init__()
        head = getattr(detector, 'mask_head', None)
        if not isinstance(head, SOLODynamicHead) or not head.unified:
            raise ValueError('only SOLOv2 with unified mask features (SOLODynamicHead) is exported')
        if not isinstance(head.postprocess, SOLOPostProcessor):
            raise ValueError('only SOLOPostProcessor is exported')
        if head.postprocess.nms['method'] != 'matrix':
            raise ValueError(f'only Matrix NMS is exported, not {head.postprocess.nms["method"]}')
        for name, module in detector.named_modules():
            if isinstance(module, DeformConv2d | ModulatedDeformConv2d) and not (
                isinstance(module, AnyDeviceDeformConv2d | AnyDeviceDCNv2) and is_plain(module)
            ):
                raise ValueError(
                    'of the deformable convolutions only AnyDeviceDCNv2 without groups is '
                    f'exported, but {name} is {type(module).__name__} with {module.groups} groups'
                )
        self.detector = detector.eval()
        self.max_candidates = max_candidates
        areas = [
            torch.full((s * s,), stride)
            for s, stride in zip(head.num_grids, head.strides, strict=True)
        ]
        self.register_buffer('min_area', torch.cat(areas), persistent=False)

    def forward(self, images: Tensor) -> BatchInstances:
        """``images`` uint8 [N, 3, H, W], channels as the data set loads them (mmdet's: BGR)."""
        pixels = self.preprocess(images)
        outputs = self.detector.mask_head(self.detector.extract_feat(pixels))
        return self.postprocess(outputs, pixels.shape[-2:], images.shape[-2:])

    def preprocess(self, images: Tensor) -> Tensor:
        """What the detector's preprocessor does: [N, 3, H, W] normalised and padded."""
        given = self.detector.data_preprocessor
        pixels = images.float()
        if given._channel_conversion:
            pixels = pixels.flip(1)
        if given._enable_normalize:
            pixels = (pixels - given.mean) / given.std
        step = given.pad_size_divisor
        bottom, right = ((side + step - 1) // step * step - side for side in images.shape[-2:])
        return F.pad(pixels, (0, right, 0, bottom), value=given.pad_value)

    def postprocess(
        self, outputs: tuple, padded_hw: tuple[int, int], image_hw: tuple[int, int]
    ) -> BatchInstances:
        """The instances from the outputs of the head."""
        head = self.detector.mask_head
        post, nms = head.postprocess, head.postprocess.suppression
        mask_thr = post.maps['mask_thr']
        cls_logits, kernel_feats, (features,) = outputs
        kernels = flatten_grids([head.conv_kernel(grid) for grid in kernel_feats])
        scores = grid_scores(cls_logits).flatten(1)
        most = scores.shape[1]
        num = min(n for n in (nms['max_num'], nms['nms_pre'], most) if n > 0)
        limit = most if self.max_candidates is None else min(max(self.max_candidates, num), most)
        count = (scores > post.score_thr).sum(1).amax(0).clamp(num, limit).item()
        torch._check(count >= num)
        torch._check(count <= limit)

        # In the order of cells and classes, which is that of equal scores.
        candidates = scores.topk(count).indices.sort().values
        image = torch.arange(scores.shape[0], device=scores.device)[:, None]
        cells, labels = candidates // head.num_classes, candidates % head.num_classes
        scores = scores[image, candidates]
        map_hw = features.shape[-2:]
        if head.kernel_size > 1:
            features = F.unfold(features, head.kernel_size, padding=head.kernel_size // 2)
        probs = (kernels[image, cells] @ features.flatten(2)).sigmoid()
        masks = (probs > mask_thr).float()
        areas = masks.sum(2)
        found = (scores > post.score_thr) & (areas > self.min_area[cells])
        if post.maskness:
            scores = scores * (probs * masks).sum(2) / areas
        scores = torch.where(found, scores, 0)

        # What is not found has no score: it comes last and decays nothing else.
        scores, order = scores.sort(dim=1, descending=True)
        if nms['nms_pre'] > 0:
            count = torch.sym_min(count, nms['nms_pre'])
            scores, order = scores[:, :count], order[:, :count]
        masks, areas, labels = (values[image, order] for values in (masks, areas, labels))
        common = masks @ masks.mT
        iou = common / (areas[:, :, None] + areas[:, None] - common).clamp(min=1)
        iou = iou * (labels[:, :, None] == labels[:, None])
        scores = scores * matrix_decay(iou, nms['kernel'], nms['sigma'])
        scores, rank = scores.sort(dim=1, descending=True)
        scores, rank = scores[:, :num], rank[:, :num]

        found = (scores > 0) & (scores >= nms['filter_thr'])
        probs = probs[image, order[image, rank]].unflatten(2, map_hw)
        height, width = image_hw
        probs = F.interpolate(probs, padded_hw, mode='bilinear')[..., :height, :width]
        masks = (probs > mask_thr) & found[..., None, None]
        return BatchInstances(
            mask_boxes(masks),
            scores * found,
            torch.where(found, labels[image, rank], -1),
            masks,
            found.sum(1),
        )
