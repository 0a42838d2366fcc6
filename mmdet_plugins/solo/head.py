"""Heads of SOLO and Decoupled SOLO; SOLOv2's is :class:`..common.location_head.SOLODynamicHead`.

The three differ in how a grid cell's mask comes about, and in nothing else: by a static kernel on
its level's features, as a product of a row and a column map, by a dynamic kernel on features of all
levels.

Shapes: Q positive or candidate cells, S cells a side of a level's grid, ``h w`` a mask map.
"""

from mmdet.registry import MODELS
from torch import Tensor

from ..common.location_head import LevelMaskHead
from ..ops.dice import dynamic_mask_logits
from .network import DecoupledNetwork, VanillaNetwork, upsample


@MODELS.register_module()
class SOLOVanillaHead(LevelMaskHead, VanillaNetwork):
    """SOLO (sections 3.2 and 3.3): arguments are those of its two bases."""

    def mask_sizes(self, outputs: tuple) -> list[tuple[int, int]]:
        return [(2 * feat.shape[-2], 2 * feat.shape[-1]) for feat in outputs[1]]

    def level_factors(
        self, outputs: tuple, level: int, images: Tensor, cells: Tensor, counts: list[int]
    ) -> tuple[Tensor, ...]:
        feats, conv = outputs[1][level], self.conv_mask_list[level]
        kernels = conv.weight.flatten(1)[cells].to(feats.dtype)
        logits = dynamic_mask_logits(feats, kernels, counts) + conv.bias[cells, None, None]
        # The 1x1 convolution commutes with the doubling that precedes it in the paper.
        return (upsample(logits[:, None])[:, 0],)


@MODELS.register_module()
class SOLODecoupledHead(LevelMaskHead, DecoupledNetwork):
    """Decoupled SOLO (section 3.4): arguments are those of its two bases."""

    def mask_sizes(self, outputs: tuple) -> list[tuple[int, int]]:
        return [tuple(columns.shape[-2:]) for columns in outputs[1]]

    def level_factors(
        self, outputs: tuple, level: int, images: Tensor, cells: Tensor, counts: list[int]
    ) -> tuple[Tensor, ...]:
        _, columns, rows = outputs
        size = self.num_grids[level]
        return columns[level][images, cells % size], rows[level][images, cells // size]
