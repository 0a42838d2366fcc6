"""Networks of SOLO and Decoupled SOLO, and the parts in which SOLO's ablations differ.

Shapes: N images, L levels, S cells a side of a level's grid, K classes, C input channels,
F channels of the towers, ``h w`` a level's feature map.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmdet.registry import MODELS
from mmengine.model import BaseModule
from torch import Tensor, nn

from ..common.dynamic_mask_head import (
    GROUP_NORM,
    ConvTower,
    pixel_coordinates,
    resample_levels,
)

SAMPLES_PER_CELL = 4
"""Points a side of a cell that region-grid-interpolation averages; the paper gives no number."""


def align_to_grid(feat: Tensor, size: int, method: str) -> Tensor:
    """Features [N, C, h, w] of the category branch on a grid [N, C, S, S] (section 3.3.3).

    Args:
        method: ``'interpolate'``, ``'adaptive_pool'`` (maximum) or ``'region_grid'`` (mean over
            bilinear samples spread over the cell).
    """
    if method == 'interpolate':
        return F.interpolate(feat, size=(size, size), mode='bilinear')
    if method == 'adaptive_pool':
        return F.adaptive_max_pool2d(feat, size)
    if method == 'region_grid':
        dense = size * SAMPLES_PER_CELL
        samples = F.interpolate(feat, size=(dense, dense), mode='bilinear')
        return F.avg_pool2d(samples, SAMPLES_PER_CELL)
    raise ValueError(
        f"cls_align must be 'interpolate', 'adaptive_pool' or 'region_grid', not {method!r}"
    )


class GridNetwork(BaseModule):
    """What SOLO and Decoupled SOLO share: levels, coordinates and the category branch.

    Args:
        num_classes: K.
        in_channels: C.
        num_grids: S of each level.
        in_strides: Of the pyramid.
        strides: At which the levels enter the head; masks come at half of them.
        feat_channels: F.
        stacked_convs: Depth of the towers (Table 3.5).
        num_coord_convs: Layers of a mask tower that see coordinates (Table 3.3).
        cls_align: How features get onto the category grid, see :func:`align_to_grid`.
        dcn: Which layers of the towers are deformable: ``'none'``, ``'last'`` or ``'all'``.
        norm_cfg: Of the towers.
    """

    MASK_LAYERS: tuple[str, ...] = ()
    """Names of the last mask layers, which start at a probability of 0.01."""

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        num_grids: Sequence[int] = (40, 36, 24, 16, 12),
        in_strides: Sequence[int] = (4, 8, 16, 32, 64),
        strides: Sequence[int] = (8, 8, 16, 32, 32),
        feat_channels: int = 256,
        stacked_convs: int = 7,
        num_coord_convs: int = 1,
        cls_align: str = 'interpolate',
        dcn: str = 'none',
        norm_cfg: dict | None = GROUP_NORM,
        init_cfg: dict | list | None = None,
    ) -> None:
        super().__init__(
            init_cfg
            or dict(
                type='Normal',
                layer='Conv2d',
                std=0.01,
                override=[
                    dict(type='Normal', name=name, std=0.01, bias_prob=0.01)
                    for name in ('conv_cls', *self.MASK_LAYERS)
                ],
            )
        )
        self.num_grids = tuple(num_grids)
        self.in_strides = tuple(in_strides)
        self.strides = tuple(strides)
        self.cls_align = cls_align
        self.feat_channels = feat_channels
        self._tower = dict(
            in_channels=in_channels,
            feat_channels=feat_channels,
            depth=stacked_convs,
            dcn=dcn,
            norm_cfg=norm_cfg,
        )
        self._num_coord_convs = num_coord_convs
        self.cls_convs = ConvTower(**self._tower)
        self.conv_cls = nn.Conv2d(feat_channels, num_classes, 3, padding=1)

    def mask_tower(self, coord_channels: int) -> ConvTower:
        """A tower that sees coordinates as the options say."""
        return ConvTower(
            **self._tower, num_coord_convs=self._num_coord_convs, coord_channels=coord_channels
        )

    def categories(self, feats: Sequence[Tensor]) -> list[Tensor]:
        """Logits, L maps [N, K, S, S], of levels [N, C, h, w]."""
        grids = [
            align_to_grid(feat, size, self.cls_align)
            for feat, size in zip(feats, self.num_grids, strict=True)
        ]
        return [self.conv_cls(grid) for grid in self.cls_convs(grids)]


class VanillaNetwork(GridNetwork):
    """SOLO: a 1x1 convolution with one output channel for each cell (section 3.2.2).

    Parameters are those of mmdet's ``SOLOHead``. The last convolution is not run as one: its S*S
    channels are computed for the cells that are asked for, positives or candidates.
    """

    MASK_LAYERS = ('conv_mask_list',)

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.mask_convs = self.mask_tower(coord_channels=2)
        self.conv_mask_list = nn.ModuleList(
            nn.Conv2d(self.feat_channels, size**2, 1) for size in self.num_grids
        )

    def forward(self, x: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Category logits, L maps [N, K, S, S], and mask features, L maps [N, F, h, w]."""
        resampled = resample_levels(x, self.in_strides, self.strides)
        coords = [pixel_coordinates(feat) for feat in resampled]
        return self.categories(resampled), self.mask_convs(resampled, coords)


class DecoupledNetwork(GridNetwork):
    """Decoupled SOLO: one map for each row and each column of the grid (section 3.4).

    Parameters and values are those of mmdet's ``DecoupledSOLOHead``, or, with a shared tower, of
    its ``DecoupledSOLOLightHead``.

    Args:
        shared_tower: One tower for rows and columns, the light form.
        **kwargs: Of :class:`GridNetwork`.
    """

    MASK_LAYERS = ('conv_mask_list_x', 'conv_mask_list_y')

    def __init__(self, *args, shared_tower: bool = False, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.shared_tower = shared_tower
        if shared_tower:
            self.mask_convs = self.mask_tower(coord_channels=2)
        else:
            self.mask_convs_x = self.mask_tower(coord_channels=1)
            self.mask_convs_y = self.mask_tower(coord_channels=1)
        for name in self.MASK_LAYERS:
            layers = (nn.Conv2d(self.feat_channels, s, 3, padding=1) for s in self.num_grids)
            setattr(self, name, nn.ModuleList(layers))

    def forward(self, x: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Category logits, L maps [N, K, S, S]; column and row logits, L maps [N, S, 2h, 2w]."""
        resampled = resample_levels(x, self.in_strides, self.strides)
        coords = [pixel_coordinates(feat) for feat in resampled]
        if self.shared_tower:
            feats_x = feats_y = self.mask_convs(resampled, coords)
        else:
            feats_x = self.mask_convs_x(resampled, [pair[:, :1] for pair in coords])
            feats_y = self.mask_convs_y(resampled, [pair[:, 1:] for pair in coords])
        columns, rows = [], []
        for level, (feat_x, feat_y) in enumerate(zip(feats_x, feats_y, strict=True)):
            up_x = upsample(feat_x)
            up_y = up_x if self.shared_tower else upsample(feat_y)
            columns.append(self.conv_mask_list_x[level](up_x))
            rows.append(self.conv_mask_list_y[level](up_y))
        return self.categories(resampled), columns, rows


@MODELS.register_module()
class SOLOSeparateMaskFeatures(BaseModule):
    """Mask features of each level by itself, as SOLO makes them (Table 4.5, "separate").

    Args:
        in_channels: C.
        out_channels: E, also inside.
        stacked_convs: Depth of the tower that all levels share.
        with_coords: Show coordinates to its first layer.
        norm_cfg: Of the tower.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        stacked_convs: int = 7,
        with_coords: bool = True,
        norm_cfg: dict | None = GROUP_NORM,
        init_cfg: dict | list | None = None,
    ) -> None:
        super().__init__(init_cfg or dict(type='Normal', layer='Conv2d', std=0.01))
        self.out_channels = out_channels
        self.convs = ConvTower(
            in_channels, out_channels, stacked_convs, int(with_coords), norm_cfg=norm_cfg
        )

    def forward(self, feats: Sequence[Tensor], resampled: Sequence[Tensor]) -> list[Tensor]:
        """L maps [N, E, 2h, 2w] from the resampled pyramid; ``feats`` plays no part."""
        coords = [pixel_coordinates(feat) for feat in resampled]
        return [upsample(feat) for feat in self.convs(resampled, coords)]


@MODELS.register_module()
class SOLOMergeNeck(BaseModule):
    """C3 to C5 merged at the stride of C3, for SOLO with a single level (Table 3.2).

    The paper does not say how they are merged: here as FPN's top-down path does it, with bilinear
    enlargement.

    Args:
        in_channels: Of the levels, finest first.
        out_channels: Of the one output.
        norm_cfg: Of each convolution.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int = 256,
        norm_cfg: dict | None = None,
        init_cfg: dict | list | None = None,
    ) -> None:
        super().__init__(init_cfg or dict(type='Xavier', layer='Conv2d', distribution='uniform'))
        conv = dict(norm_cfg=norm_cfg, act_cfg=None)
        self.lateral_convs = nn.ModuleList(
            ConvModule(channels, out_channels, 1, **conv) for channels in in_channels
        )
        self.out_conv = ConvModule(out_channels, out_channels, 3, padding=1, **conv)

    def forward(self, feats: Sequence[Tensor]) -> tuple[Tensor]:
        """Maps [N, C_i, h_i, w_i] -> one map [N, C, h_0, w_0]."""
        laterals = [conv(feat) for conv, feat in zip(self.lateral_convs, feats, strict=True)]
        size = laterals[0].shape[-2:]
        merged = laterals[0]
        for lateral in laterals[1:]:
            merged = merged + F.interpolate(lateral, size=size, mode='bilinear')
        return (self.out_conv(merged),)


def upsample(x: Tensor) -> Tensor:
    """[N, C, h, w] -> [N, C, 2h, 2w], bilinear."""
    return F.interpolate(x, scale_factor=2, mode='bilinear')
