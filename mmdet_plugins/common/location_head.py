"""Heads that segment by location: a network, wired to targets, losses and post-processing.

Around them stands mmdet's detector. They differ in how a grid cell's mask comes about, and in
nothing else; SOLOv2's, by a dynamic kernel, is here, since more than one method trains it. A head
never forms the masks of all cells, only those that are asked for. Sections and equations are those
of Wang's thesis, chapters 3 and 4.

Shapes: N images, L levels, S cells a side of a level's grid, P cells of all levels (level by level,
row by row), K classes, Q positive or candidate cells, G objects of the batch, ``h w`` a mask map.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from operator import mul
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from mmdet.models import SOLO
from mmdet.models.utils import unpack_gt_instances
from mmdet.registry import MODELS, TASK_UTILS
from mmdet.structures.mask import BitmapMasks
from mmdet.utils import reduce_mean
from mmengine.dist import get_world_size
from mmengine.model import BaseModule
from mmengine.structures import InstanceData
from torch import Tensor, nn

from ..ops.dice import dynamic_mask_logits, mask_dice_loss, wide
from ..ops.grid_targets import GridTargets, Positives, grid_targets
from ..ops.instance_masks import Frame
from .dynamic_mask_head import DynamicMaskHead, UnifiedMaskFeatures
from .finite import require_finite
from .mask_postprocess import grid_scores
from .memory_format import reordered_on_cpu
from .ranks import mean_over_ranks


@MODELS.register_module()
class LocationSegmentor(SOLO):
    """mmdet's ``SOLO``, which its ``SOLOv2`` equals, but faster on a CPU."""

    def extract_feat(self, batch_inputs: Tensor) -> tuple[Tensor, ...]:
        """The pyramid, L maps [N, C, h, w], of images [N, 3, H, W]."""
        return super().extract_feat(reordered_on_cpu(batch_inputs, self))


class PositiveMasks(NamedTuple):
    """Predictions that share one tensor of mask targets."""

    factors: tuple[Tensor, ...]
    """Logits [Q, h, w]; a mask is the product of the sigmoids of its factors."""
    targets: Tensor
    """Bool [G, h, w]."""
    object_idx: Tensor
    """[Q], the target of each prediction."""


@MODELS.register_module()
class SOLODiceLoss(nn.Module):
    """Dice loss with squares in the denominator (equations 3.3 and 3.4), a number for each mask.

    mmdet's takes one target for each prediction, which repeats an object's mask for every cell that
    predicts it, and keeps half a dozen maps a mask for the gradient.

    Args:
        loss_weight: lambda of equation 3.1.
        eps: Added to both sums of the denominator.
    """

    def __init__(self, loss_weight: float = 3.0, eps: float = 1e-3) -> None:
        super().__init__()
        self.loss_weight = loss_weight
        self.eps = eps

    def forward(self, factors: tuple[Tensor, ...], targets: Tensor, object_idx: Tensor) -> Tensor:
        """Losses [Q] of masks whose targets are ``targets[object_idx]``, bool [G, h, w].

        Args:
            factors: Logit maps [Q, h, w]; the mask is the product of their sigmoids.
        """
        return self.loss_weight * mask_dice_loss(factors, targets, object_idx, self.eps)


class LocationHead(BaseModule):
    """What the heads share: from a batch to losses, and from features to instances.

    mmdet's heads build a mask for every cell, move each ground truth to the host and back several
    times, and give no boxes.

    Args:
        num_classes: K.
        scale_ranges: Of the square root of an object's box area, px, one a level.
        center_ratio: Sides of the region of positive cells, in sides of the box (epsilon).
        loss_cls: Config of a loss on category logits, as mmdet's.
        loss_mask: Config of a loss called with a :class:`PositiveMasks`.
        train_cfg: Not used; the detector gives it.
        test_cfg: Arguments of the post-processor, :class:`SOLOPostProcessor` if it names none.
        **network: For the network.
    """

    def __init__(
        self,
        num_classes: int,
        scale_ranges: Sequence[tuple[float, float]],
        loss_cls: dict,
        loss_mask: dict,
        center_ratio: float = 0.2,
        train_cfg: dict | None = None,
        test_cfg: dict | None = None,
        **network,
    ) -> None:
        super().__init__(num_classes=num_classes, **network)
        if not len(self.num_grids) == len(self.strides) == len(scale_ranges):
            raise ValueError(
                f'num_grids, strides and scale_ranges must name the same levels, but there are '
                f'{len(self.num_grids)}, {len(self.strides)} and {len(scale_ranges)} of them'
            )
        self.num_classes = num_classes
        self.scale_ranges = tuple(map(tuple, scale_ranges))
        self.center_ratio = center_ratio
        self.loss_cls = MODELS.build(loss_cls)
        self.loss_mask = MODELS.build(loss_mask)
        self.test_cfg = test_cfg
        if test_cfg is not None:
            self.postprocess = TASK_UTILS.build({'type': 'SOLOPostProcessor', **test_cfg})

    def mask_sizes(self, outputs: tuple) -> list[tuple[int, int]]:
        """Size (h, w) of the masks of each level."""
        raise NotImplementedError

    def mask_strides(self) -> list[int]:
        """Pixels of the input to one of a mask, for each level."""
        return [stride // 2 for stride in self.strides]

    def positive_masks(self, outputs: tuple, targets: GridTargets) -> list[PositiveMasks]:
        """Predictions that are trained, in groups."""
        raise NotImplementedError

    maps_are_logits: bool
    """Whether :meth:`candidate_maps` gives logits, otherwise probabilities."""

    def candidate_maps(self, outputs: tuple, image: int) -> Callable[[Tensor], Tensor]:
        """What gives mask maps [Q, h, w], of the finest size, of cells ([Q], in P) of an image."""
        raise NotImplementedError

    def loss(
        self, x: Sequence[Tensor], batch_data_samples: list, positive_infos: None = None
    ) -> dict[str, Tensor]:
        """Losses ``loss_mask`` and ``loss_cls``.

        Args:
            x: The pyramid, L maps [N, C, h, w].
            batch_data_samples: With ``bboxes``, ``labels`` and ``masks`` in ``gt_instances``.
            positive_infos: What mmdet's detector passes; None.

        Raises:
            FloatingPointError: A loss is not finite.
        """
        gt_instances, _, img_metas = unpack_gt_instances(batch_data_samples)
        outputs = self(x)
        losses = self.loss_by_feat(outputs, gt_instances)
        require_finite(losses, img_metas)
        return losses

    def loss_by_feat(
        self, outputs: tuple, batch_gt_instances: list[InstanceData]
    ) -> dict[str, Tensor]:
        """Losses from the network's outputs (equation 3.1)."""
        targets = self.get_targets(outputs, batch_gt_instances)
        total = sum(self.loss_mask(*group).sum() for group in self.positive_masks(outputs, targets))
        return dict(
            loss_mask=total / mean_over_ranks(targets.num_positives),
            loss_cls=self.category_loss(outputs, targets),
        )

    def category_loss(self, outputs: tuple, targets: GridTargets) -> Tensor:
        """The loss of the category logits of all cells."""
        logits = flatten_grids(outputs[0])
        return self.loss_cls(
            logits.to(wide(logits.dtype)).flatten(0, 1),
            targets.labels.flatten(),
            avg_factor=reduce_mean(targets.num_positives.float()) + 1 / get_world_size(),
        )

    def get_targets(self, outputs: tuple, batch_gt_instances: list[InstanceData]) -> GridTargets:
        """Which cells are positive, and what their masks should be."""
        device = outputs[0][0].device
        return grid_targets(
            [_mask_array(gts.masks) for gts in batch_gt_instances],
            [gts.bboxes.to(device) for gts in batch_gt_instances],
            [gts.labels.to(device) for gts in batch_gt_instances],
            grid_sizes=self.num_grids,
            scale_ranges=self.scale_ranges,
            mask_strides=self.mask_strides(),
            mask_hw=self.mask_sizes(outputs),
            num_classes=self.num_classes,
            centre_ratio=self.center_ratio,
        )

    def predict(
        self,
        x: Sequence[Tensor],
        batch_data_samples: list,
        rescale: bool = False,
        results_list: None = None,
    ) -> list[InstanceData]:
        """Instances of each image, in pixels of the original images if ``rescale``."""
        outputs = self(x)
        with torch.autocast(x[0].device.type, enabled=False):
            return self.predict_by_feat(
                _widen(outputs), [sample.metainfo for sample in batch_data_samples], rescale
            )

    def predict_by_feat(
        self, outputs: tuple, batch_img_metas: list[dict], rescale: bool = False
    ) -> list[InstanceData]:
        """Instances from the network's outputs."""
        min_area = torch.cat(
            [
                grid.new_full((size**2,), stride)
                for grid, size, stride in zip(outputs[0], self.num_grids, self.strides, strict=True)
            ]
        )
        map_hw, map_stride = self.mask_sizes(outputs)[0], self.mask_strides()[0]
        results = []
        for image, meta in enumerate(batch_img_metas):
            results.append(
                self.postprocess(
                    grid_scores([grid[image] for grid in outputs[0]]),
                    min_area,
                    self.candidate_maps(outputs, image),
                    frame_of(map_hw, map_stride, meta, rescale),
                    self.maps_are_logits,
                )
            )
        return results

    def cell_levels(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Level of each cell in P and its place in the level's grid, both [Q]."""
        ends = torch.tensor([size**2 for size in self.num_grids], device=cells.device).cumsum(0)
        level = torch.bucketize(cells, ends, right=True)
        return level, cells - torch.cat([ends.new_zeros(1), ends])[level]


class LevelMaskHead(LocationHead):
    """A head whose levels have mask maps of their own, at half the levels' strides."""

    maps_are_logits = False

    def level_factors(
        self, outputs: tuple, level: int, images: Tensor, cells: Tensor, counts: list[int]
    ) -> tuple[Tensor, ...]:
        """Factors [Q, h, w] of the masks of cells ([Q], in S*S) of a level, ordered by image.

        Args:
            images: [Q].
            counts: How many of the cells each image has.
        """
        raise NotImplementedError

    def positive_masks(self, outputs: tuple, targets: GridTargets) -> list[PositiveMasks]:
        positives, counts = targets.by_level()
        sizes = [size**2 for size in self.num_grids]
        owned = (targets.owner >= 0).split(sizes, dim=1)
        image_counts = torch.stack([level.sum(1) for level in owned]).tolist()
        _, cells = self.cell_levels(positives.cell_idx)
        parts = (part.split(counts) for part in (positives.image_idx, cells, positives.object_idx))
        return [
            PositiveMasks(
                self.level_factors(outputs, level, images, level_cells, image_counts[level]),
                targets.masks[level],
                objects,
            )
            for level, (images, level_cells, objects) in enumerate(zip(*parts, strict=True))
        ]

    def candidate_maps(self, outputs: tuple, image: int) -> Callable[[Tensor], Tensor]:
        size = self.mask_sizes(outputs)[0]
        one = tuple([maps[image : image + 1] for maps in part] for part in outputs)

        def maps_of(cells: Tensor) -> Tensor:
            levels, places = self.cell_levels(cells)
            maps = one[0][0].new_empty(len(cells), *size)
            for level in levels.unique().tolist():
                mine = (levels == level).nonzero()[:, 0]
                factors = self.level_factors(
                    one, level, torch.zeros_like(mine), places[mine], [len(mine)]
                )
                probs = (
                    F.interpolate(factor.sigmoid()[None], size=size, mode='bilinear')[0]
                    for factor in factors
                )
                maps[mine] = reduce(mul, probs)
            return maps

        return maps_of


@MODELS.register_module()
class SOLODynamicHead(LevelMaskHead, DynamicMaskHead):
    """SOLOv2 (section 4.2): arguments are those of its two bases.

    Like masks, kernels are computed for the cells that are asked for, some hundreds of 3872.
    """

    @property
    def unified(self) -> bool:
        """Whether all levels share one map of mask features."""
        return isinstance(self.mask_feature_head, UnifiedMaskFeatures)

    @property
    def maps_are_logits(self) -> bool:
        return self.unified

    def mask_strides(self) -> list[int]:
        return [self.in_strides[0]] * len(self.strides) if self.unified else super().mask_strides()

    def mask_sizes(self, outputs: tuple) -> list[tuple[int, int]]:
        sizes = [tuple(feat.shape[-2:]) for feat in outputs[2]]
        return sizes * len(self.strides) if self.unified else sizes

    def positive_masks(self, outputs: tuple, targets: GridTargets) -> list[PositiveMasks]:
        if not self.unified:
            return super().positive_masks(outputs, targets)
        return [self.unified_masks(outputs, targets, *targets.by_image())]

    def unified_masks(
        self, outputs: tuple, targets: GridTargets, positives: Positives, counts: Sequence[int]
    ) -> PositiveMasks:
        """Predictions of cells, ordered by image, on the one map of mask features.

        Args:
            counts: How many of the cells each image has.
        """
        kernels_at = convolve_at(self.conv_kernel, outputs[1])
        kernels = kernels_at(positives.image_idx, positives.cell_idx)
        logits = dynamic_mask_logits(outputs[2][0], kernels, counts)
        return PositiveMasks((logits,), targets.masks[0], positives.object_idx)

    def candidate_maps(self, outputs: tuple, image: int) -> Callable[[Tensor], Tensor]:
        if not self.unified:
            return super().candidate_maps(outputs, image)
        features = outputs[2][0][image : image + 1]
        kernels_of = self.image_kernels(outputs, image)
        return lambda cells: dynamic_mask_logits(features, kernels_of(cells), [len(cells)])

    def level_factors(
        self, outputs: tuple, level: int, images: Tensor, cells: Tensor, counts: list[int]
    ) -> tuple[Tensor, ...]:
        kernels = convolve_at(self.conv_kernel, outputs[1][level : level + 1])(images, cells)
        return (dynamic_mask_logits(outputs[2][level], kernels, counts),)

    def image_kernels(self, outputs: tuple, image: int) -> Callable[[Tensor], Tensor]:
        """What gives the kernels [Q, D] of cells ([Q], in P) of an image."""
        kernels_at = convolve_at(self.conv_kernel, [grid[image : image + 1] for grid in outputs[1]])
        return lambda cells: kernels_at(torch.zeros_like(cells), cells)


def flatten_grids(grids: list[Tensor]) -> Tensor:
    """L maps [N, C, S, S] -> [N, P, C]."""
    return torch.cat([grid.flatten(2) for grid in grids], 2).transpose(1, 2)


def convolve_at(conv: nn.Conv2d, grids: list[Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """What gives values [Q, D] of a 3x3 convolution, padded by one, of L maps [N, C, S, S].

    It takes images and cells, both [Q], the latter in P.
    """
    padded, around, start = [], [], 0
    for grid in grids:
        padded.append(F.pad(grid.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).flatten(1, 2))
        sides, stop = [side + 2 for side in grid.shape[2:]], start + padded[-1].shape[1]
        places = torch.arange(start, stop, device=grid.device).view(sides)
        around.append(places.unfold(0, 3, 1).unfold(1, 3, 1).flatten(2).flatten(0, 1))
        start = stop
    padded, around = torch.cat(padded, 1), torch.cat(around)
    weight = conv.weight.permute(0, 2, 3, 1).flatten(1).to(padded.dtype)
    bias = conv.bias.to(padded.dtype)

    def values_at(images: Tensor, cells: Tensor) -> Tensor:
        patches = padded[images[:, None], around[cells]]
        return F.linear(patches.flatten(1), weight, bias)

    return values_at


def frame_of(map_hw: tuple[int, int], map_stride: int, meta: dict, rescale: bool) -> Frame:
    """The sizes that maps of an image go through, at last the original one if ``rescale``."""
    image_hw = tuple(meta['img_shape'][:2])
    return Frame(
        map_hw,
        tuple(side * map_stride for side in map_hw),
        image_hw,
        tuple(meta['ori_shape'][:2]) if rescale else image_hw,
    )


def _widen(outputs: tuple) -> tuple:
    return tuple([maps.to(wide(maps.dtype)) for maps in part] for part in outputs)


def _mask_array(masks) -> Tensor | np.ndarray:
    """[G, H, W] of mmdet's bitmaps or polygons, or of a tensor."""
    if isinstance(masks, BitmapMasks):
        return masks.masks
    return masks if isinstance(masks, Tensor) else masks.to_ndarray()
