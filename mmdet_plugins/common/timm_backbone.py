"""Any timm model as the backbone of a detector or a segmenter.

Registered with mmengine, so that configs of mmdet and of mmseg find ``type='TimmBackbone'``.
"""

import difflib
from collections.abc import Sequence
from typing import Any

from mmengine.model import BaseModule
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor, nn


@MODELS.register_module()
class TimmBackbone(BaseModule):
    """A timm model by name, giving NCHW features of any non-square input.

    mmseg's ``TIMMBackbone`` downloads weights when it is built unless told otherwise, hands on the
    NHWC features of Swin as they are, and leaves it to one input size.

    Args:
        model_name: As timm lists it, with or without a tag (``resnet50.a1_in1k``).
        out_indices: Which of timm's feature levels to return; by default the last four, which for
            most models have strides 4, 8, 16 and 32.
        norm_eval: Keep batch norm layers in evaluation mode, for small batches.
        init_cfg: ``dict(type='Pretrained', checkpoint=...)``: a path or URL of weights of the timm
            model, or ``'timm://'`` for those that timm itself would download. By default timm's
            random initialisation; nothing is ever downloaded when the model is built.
        **kwargs: For ``timm.create_model``, such as ``drop_path_rate``.

    Attributes:
        out_channels: Channels of each returned level, what a neck needs as ``in_channels``.
        out_strides: Stride of each returned level.

    Raises:
        ImportError: timm is not installed.
        ValueError: timm has no such model.
    """

    def __init__(
        self,
        model_name: str,
        out_indices: Sequence[int] = (-4, -3, -2, -1),
        norm_eval: bool = False,
        init_cfg: dict | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(init_cfg)
        self.norm_eval = norm_eval
        self._recipe = dict(
            model_name=model_name, features_only=True, out_indices=tuple(out_indices), **kwargs
        )
        self.timm_model = _create(pretrained=False, **self._recipe)
        self.out_channels = self.timm_model.feature_info.channels()
        self.out_strides = self.timm_model.feature_info.reduction()
        self._channels_last = getattr(self.timm_model, 'output_fmt', 'NCHW') == 'NHWC'

    def init_weights(self) -> None:
        """Load what ``init_cfg`` names; without it timm's own initialisation stays."""
        if self.is_init:
            return
        if self.init_cfg is not None:
            checkpoint = self.init_cfg['checkpoint']
            if checkpoint == 'timm://':
                state_dict = _create(pretrained=True, **self._recipe).state_dict()
            else:
                loaded = CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu')
                state_dict = loaded.get('state_dict', loaded)
            mismatch = self.timm_model.load_state_dict(state_dict, strict=False)
            if mismatch.missing_keys:
                raise ValueError(
                    f'{checkpoint} lacks {len(mismatch.missing_keys)} weights of timm model '
                    f'{self._recipe["model_name"]}, {mismatch.missing_keys[0]} for one: give a '
                    'state dict of that model'
                )
        self.is_init = True

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Features [N, C, h, w] of ``x`` [N, 3, H, W], one per out index."""
        feats = self.timm_model(x)
        if self._channels_last:
            feats = [feat.permute(0, 3, 1, 2).contiguous() for feat in feats]
        return tuple(feats)

    def train(self, mode: bool = True) -> 'TimmBackbone':
        """As ``nn.Module``, but for batch norm if ``norm_eval``."""
        super().train(mode)
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


def _create(model_name: str, **kwargs: Any) -> nn.Module:
    """A timm model that, where its kind can, takes any input size."""
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            f'backbone {model_name} needs timm, which cannot be imported ({error}): '
            'pip install timm'
        ) from error
    if not timm.is_model(model_name):
        close = difflib.get_close_matches(model_name, timm.list_models(), n=3)
        raise ValueError(
            f'timm {timm.__version__} has no model {model_name!r}'
            + (f'; close to it are {", ".join(close)}' if close else '')
        )
    # Models with a fixed grid have a switch of one of these names, the others take any size.
    for switch in (dict(strict_img_size=False), dict(dynamic_img_size=True), {}):
        try:
            model = timm.create_model(model_name, **switch, **kwargs)
            break
        except TypeError as error:
            if not any(name in str(error) for name in switch):
                raise
    for module in model.modules():
        if isinstance(module, timm.layers.PatchEmbed):
            module.dynamic_img_pad = True
    return model
