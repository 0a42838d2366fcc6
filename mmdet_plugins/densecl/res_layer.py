"""The last stage of a C4 detector, as the protocols of self-supervised learning have it."""

from mmcv.cnn import build_norm_layer
from mmdet.models.roi_heads.shared_heads import ResLayer
from mmdet.registry import MODELS
from torch import Tensor


@MODELS.register_module()
class DenseCLResLayer(ResLayer):
    """mmdet's ``ResLayer`` with another layer of normalisation behind it (MoCo, its appendix).

    Features that were learnt without labels are not of the scale that fine-tuning is tuned for.

    Args:
        **kwargs: As for ``ResLayer``, by name.
    """

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        channels = getattr(self, f'layer{self.stage + 1}')[-1].conv3.out_channels
        self.norm = build_norm_layer(self.norm_cfg, channels)[1]

    def forward(self, x: Tensor) -> Tensor:
        """Regions [R, C, h, w] -> [R, 2 C, h / stride, w / stride]."""
        return self.norm(super().forward(x))
