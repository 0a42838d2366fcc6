"""mmcv's deformable convolutions, trainable on the CPU and safe under any autocast.

Parameters, their names and the values are mmcv's; on CUDA its kernels are used. They know no bf16,
so everything runs in the precision of the weights.
"""

import torch
from mmcv.ops import DeformConv2d, ModulatedDeformConv2dPack, modulated_deform_conv2d
from mmengine.registry import MODELS
from torch import Tensor

from ..ops.deform_conv import deform_conv2d


def is_plain(module: DeformConv2d | ModulatedDeformConv2dPack) -> bool:
    """Whether :func:`deform_conv2d` can take its place: no groups, the same on both axes."""
    pairs = (module.kernel_size, module.stride, module.padding, module.dilation)
    square = all(first == second for first, second in pairs)
    return square and module.groups == module.deform_groups == 1


class AnyDeviceDeformConv2d(DeformConv2d):
    """``DeformConv2d`` that trains on the CPU as well; odd ones (groups, oblong) stay mmcv's."""

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        """``x`` [N, C, H, W], ``offset`` [N, 2*K, h, w] -> [N, O, h, w]."""
        with torch.autocast(x.device.type, enabled=False):
            x, offset = x.to(self.weight.dtype), offset.to(self.weight.dtype)
            if x.is_cuda or not is_plain(self):
                return super().forward(x.contiguous(), offset.contiguous())
            return deform_conv2d(
                x,
                offset,
                self.weight,
                None,
                None,
                self.stride[0],
                self.padding[0],
                self.dilation[0],
            )


@MODELS.register_module()
class AnyDeviceDCNv2(ModulatedDeformConv2dPack):
    """``DCNv2`` that trains on the CPU as well; odd ones (groups, oblong) stay mmcv's."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, O, h, w]."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.weight.dtype)
            places = self.deform_groups * self.weight[0, 0].numel()
            offset, mask = self.conv_offset(x).split([2 * places, places], 1)
            mask = torch.sigmoid(mask)
            if x.is_cuda or not is_plain(self):
                return modulated_deform_conv2d(
                    *(maps.contiguous() for maps in (x, offset, mask)),
                    self.weight,
                    self.bias,
                    self.stride,
                    self.padding,
                    self.dilation,
                    self.groups,
                    self.deform_groups,
                )
            return deform_conv2d(
                x,
                offset,
                self.weight,
                self.bias,
                mask,
                self.stride[0],
                self.padding[0],
                self.dilation[0],
            )
