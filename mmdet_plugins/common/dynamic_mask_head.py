"""The network of SOLOv2: grids of categories and mask kernels, and the features they convolve.

Wang et al., "SOLOv2: Dynamic and Fast Instance Segmentation", NeurIPS 2020, section 3.1.

Shapes: N images, L levels, S cells a side of a level's grid, K classes, C input channels, E mask
feature channels, k x k dynamic kernels, D = E*k*k, ``h w`` a level's feature map.
"""

from collections.abc import Sequence
from functools import reduce
from operator import add

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmdet.registry import MODELS
from mmengine.model import BaseModule
from torch import Tensor, nn

from ..ops.shared_conv import is_faster, shared_conv3x3
from .deform import AnyDeviceDCNv2

GROUP_NORM = dict(type='GN', num_groups=32, requires_grad=True)
DCN = dict(type=AnyDeviceDCNv2)


def pixel_coordinates(like: Tensor) -> Tensor:
    """x and y in [-1, 1] of each location of ``like`` [N, C, h, w] -> [N, 2, h, w]."""
    n, _, h, w = like.shape
    y, x = (torch.arange(size, dtype=torch.float32, device=like.device) for size in (h, w))
    y, x = (2 * line / line[-1].clamp(min=1) - 1 for line in (y, x))
    coords = torch.stack([x.expand(h, w), y[:, None].expand(h, w)])
    return coords.to(like.dtype).expand(n, -1, -1, -1)


def resample_levels(
    feats: Sequence[Tensor], in_strides: Sequence[int], strides: Sequence[int]
) -> list[Tensor]:
    """Features at the strides of the head: halved by factor, enlarged to the level below.

    SOLO halves P2 and enlarges P6 to P5, so that masks come at strides 4, 4, 8, 16, 16.
    """
    resampled = []
    for i, (feat, have, want) in enumerate(zip(feats, in_strides, strides, strict=True)):
        if want > have:
            feat = F.interpolate(feat, scale_factor=have / want, mode='bilinear')
        elif want < have:
            feat = F.interpolate(feat, size=feats[i - 1].shape[-2:], mode='bilinear')
        resampled.append(feat)
    return resampled


class ConvTower(nn.ModuleList):
    """3x3 convolutions shared by the levels, the first few of which also see coordinates.

    Args:
        in_channels: Of the input, without coordinates.
        feat_channels: Of each layer's output.
        depth: Number of layers.
        num_coord_convs: How many of them see coordinates.
        coord_channels: Channels of the coordinates.
        dcn: Which layers are deformable: ``'none'``, ``'last'`` or ``'all'``.
        norm_cfg: Of each layer.
    """

    def __init__(
        self,
        in_channels: int,
        feat_channels: int,
        depth: int,
        num_coord_convs: int = 0,
        coord_channels: int = 2,
        dcn: str = 'none',
        norm_cfg: dict | None = GROUP_NORM,
    ) -> None:
        deformable = {'none': (), 'last': (depth - 1,), 'all': range(depth)}[dcn]
        super().__init__(
            ConvModule(
                (feat_channels if i else in_channels) + coord_channels * (i < num_coord_convs),
                feat_channels,
                3,
                padding=1,
                conv_cfg=DCN if i in deformable else None,
                norm_cfg=norm_cfg,
            )
            for i in range(depth)
        )
        self.num_coord_convs = num_coord_convs

    def forward(
        self, maps: Sequence[Tensor], coords: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """L maps [N, feat_channels, h, w] from ``maps`` [N, C, h, w], ``coords`` [N, c, h, w]."""
        for i, layer in enumerate(self):
            if i < self.num_coord_convs:
                maps = [torch.cat(pair, 1) for pair in zip(maps, coords, strict=True)]
            maps = _convolve(layer, maps)
        return maps


def _convolve(layer: ConvModule, maps: Sequence[Tensor]) -> list[Tensor]:
    """A layer on each of the maps, on all at once where that is faster."""
    plain = type(layer.conv) is nn.Conv2d and layer.with_norm
    if plain and is_faster(maps, layer.conv.weight):
        convolved = shared_conv3x3(maps, layer.conv.weight)
        return [layer.activate(layer.norm(x)) for x in convolved]
    return [layer(x) for x in maps]


@MODELS.register_module()
class UnifiedMaskFeatures(BaseModule):
    """One feature map at stride 4 for the masks of all levels (SOLOv2, section 3.1.2).

    Each level goes through as many convolutions and doublings as bring it to stride 4; their sum
    through one more convolution. Parameters and values are those of mmdet's ``MaskFeatModule``,
    where coordinates are not an option.

    Args:
        in_channels: Of the pyramid.
        feat_channels: Inside.
        out_channels: E.
        end_level: Deepest level used; level 0 has stride 4.
        with_coords: Show coordinates to the deepest level.
        dcn: All convolutions deformable (v2).
        norm_cfg: Of each convolution.
    """

    def __init__(
        self,
        in_channels: int,
        feat_channels: int = 128,
        out_channels: int = 256,
        end_level: int = 3,
        with_coords: bool = True,
        dcn: bool = False,
        norm_cfg: dict | None = GROUP_NORM,
        init_cfg: dict | list | None = None,
    ) -> None:
        super().__init__(init_cfg or dict(type='Normal', layer='Conv2d', std=0.01))
        self.out_channels = out_channels
        self.end_level = end_level
        self.with_coords = with_coords
        conv = dict(conv_cfg=DCN if dcn else None, norm_cfg=norm_cfg)
        self.convs_all_levels = nn.ModuleList()
        for level in range(end_level + 1):
            layers = nn.Sequential()
            for i in range(max(level, 1)):
                if i > 0:
                    layers.add_module(f'upsample{i}', nn.Upsample(scale_factor=2, mode='bilinear'))
                channels = feat_channels if i else in_channels
                if i == 0 and level == end_level and with_coords:
                    channels += 2
                layers.add_module(
                    f'conv{i}', ConvModule(channels, feat_channels, 3, padding=1, **conv)
                )
            self.convs_all_levels.append(layers)
        self.conv_pred = ConvModule(feat_channels, out_channels, 1, **conv)

    def forward(self, feats: Sequence[Tensor], resampled: Sequence[Tensor]) -> list[Tensor]:
        """One map [N, E, H/4, W/4] from the pyramid ``feats``; ``resampled`` plays no part."""
        deepest = feats[self.end_level]
        if self.with_coords:
            deepest = torch.cat([deepest, pixel_coordinates(deepest)], 1)
        inputs = [*feats[: self.end_level], deepest]
        finest, *coarse = (convs(x) for convs, x in zip(self.convs_all_levels, inputs, strict=True))
        if coarse:
            # Doubling is linear: the levels are summed before their last one.
            finest = finest + F.interpolate(reduce(add, coarse), scale_factor=2, mode='bilinear')
        return [self.conv_pred(finest)]


class DynamicMaskHead(BaseModule):
    """Categories, mask kernels and mask features of SOLOv2, without targets and losses.

    Parameters and values are those of mmdet's ``SOLOV2Head``. ``conv_kernel`` is left to
    whoever asks for the kernels of some cells.

    Args:
        num_classes: K.
        in_channels: C.
        num_grids: S of each level.
        in_strides: Of the pyramid.
        strides: At which the levels enter the grids.
        feat_channels: Of the towers.
        stacked_convs: Depth of the towers.
        mask_features: Config of a module that gives E channels (its ``out_channels``): one map for
            all levels, or one a level, from the pyramid and from the resampled pyramid.
        kernel_size: k.
        kernel_coords: Show coordinates to the kernel tower.
        dcn: Which layers of the towers are deformable: ``'none'``, ``'last'`` or ``'all'``.
        norm_cfg: Of the towers.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        mask_features: dict,
        num_grids: Sequence[int] = (40, 36, 24, 16, 12),
        in_strides: Sequence[int] = (4, 8, 16, 32, 64),
        strides: Sequence[int] = (8, 8, 16, 32, 32),
        feat_channels: int = 512,
        stacked_convs: int = 4,
        kernel_size: int = 1,
        kernel_coords: bool = True,
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
                override=dict(type='Normal', name='conv_cls', std=0.01, bias_prob=0.01),
            )
        )
        self.num_grids = tuple(num_grids)
        self.in_strides = tuple(in_strides)
        self.strides = tuple(strides)
        self.kernel_size = kernel_size
        self.kernel_coords = kernel_coords
        tower = dict(feat_channels=feat_channels, depth=stacked_convs, dcn=dcn, norm_cfg=norm_cfg)
        self.cls_convs = ConvTower(in_channels, **tower)
        self.kernel_convs = ConvTower(in_channels + 2 * kernel_coords, **tower)
        self.conv_cls = nn.Conv2d(feat_channels, num_classes, 3, padding=1)
        self.mask_feature_head = MODELS.build({'in_channels': in_channels, **mask_features})
        self.conv_kernel = nn.Conv2d(
            feat_channels, self.mask_feature_head.out_channels * kernel_size**2, 3, padding=1
        )

    def forward(self, x: Sequence[Tensor]) -> tuple[list[Tensor], ...]:
        """Predictions from L maps [N, C, h, w].

        Returns:
            Category logits, L maps [N, K, S, S]; what ``conv_kernel`` makes kernels of, L maps
            [N, F, S, S]; mask features, one map [N, E, h, w], or one a level.
        """
        return self.forward_features(x)[:3]

    def forward_features(self, x: Sequence[Tensor]) -> tuple[list[Tensor], ...]:
        """As :meth:`forward`, and what the category logits are made of, L maps [N, F, S, S]."""
        resampled = resample_levels(x, self.in_strides, self.strides)
        channels = x[0].shape[1]
        grids = []
        for feat, size in zip(resampled, self.num_grids, strict=True):
            if self.kernel_coords:
                feat = torch.cat([feat, pixel_coordinates(feat)], 1)
            grids.append(F.interpolate(feat, size=(size, size), mode='bilinear'))
        kernel_feats = self.kernel_convs(grids)
        cls_feats = self.cls_convs([grid[:, :channels] for grid in grids])
        cls_logits = [self.conv_cls(feat) for feat in cls_feats]
        return cls_logits, kernel_feats, self.mask_feature_head(x, resampled), cls_feats
