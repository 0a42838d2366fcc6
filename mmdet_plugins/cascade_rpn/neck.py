"""FPN with CARAFE upsampling on any device.

mmcv's CARAFE is a CUDA kernel and nothing else; the classes here keep the stock modules, their
parameters and their names, and choose the operation by device.
"""

import torch
from mmcv.ops.carafe import CARAFEPack
from mmdet.models.necks import FPN_CARAFE
from mmdet.registry import MODELS
from mmengine.model import ModuleList
from torch import Tensor

from mmdet_plugins.ops.carafe import carafe


class AnyDeviceCARAFEPack(CARAFEPack):
    """mmcv's ``CARAFEPack`` (same parameters) that does not need CUDA."""

    def feature_reassemble(self, x: Tensor, mask: Tensor) -> Tensor:
        """Reassemble ``x`` [N, C, h, w] by ``mask`` [N, G*k*k, s*h, s*w]; -> [N, C, s*h, s*w]."""
        # mmcv's kernel knows float and half, and under autocast the two may differ.
        dtype = torch.float16 if x.dtype == mask.dtype == torch.float16 else torch.float32
        features, kernels = x.to(dtype), mask.to(dtype)
        if x.is_cuda:
            out = super().feature_reassemble(features.contiguous(), kernels)
        else:
            out = carafe(features, kernels, self.up_kernel, self.up_group, self.scale_factor)
        return out.to(x.dtype)


@MODELS.register_module()
class UVOCARAFEFPN(FPN_CARAFE):
    """mmdet's ``FPN_CARAFE``, which raises without a GPU, for any device.

    Arguments, parameters and their names are the stock ones, so weights load from one into the
    other. Upsampling other than CARAFE is as in the base class.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.upsample_modules = ModuleList(
            AnyDeviceCARAFEPack(
                module.channels,
                module.scale_factor,
                module.up_kernel,
                module.up_group,
                module.encoder_kernel,
                module.encoder_dilation,
                module.compressed_channels,
            )
            if isinstance(module, CARAFEPack)
            else module
            for module in self.upsample_modules
        )
