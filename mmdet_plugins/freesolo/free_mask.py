"""The network of Free Mask: a backbone, and what its features hold (section 6.2.2)."""

import math
from collections import defaultdict
from functools import partial

import torch
from mmdet.models.detectors.base import BaseDetector
from mmdet.registry import MODELS
from mmdet.structures import SampleList
from mmengine.structures import InstanceData
from torch import Tensor, nn

from ..common.mask_postprocess import EncodedMasks
from ..common.memory_format import reordered_on_cpu
from ..ops.free_mask import free_masks


@MODELS.register_module()
class FreeSOLOFreeMask(BaseDetector):
    """Objects of an image without any training: to be tested, not trained.

    A checkpoint may be that of this model, of any detector with such a backbone, or of the backbone
    alone. ``init_cfg`` of the backbone counts too, where none was loaded: the stock test loop
    ignores it, and would find "objects" in the features of random weights.

    Args:
        backbone: Config of any backbone.
        level: Which of its outputs holds queries and keys.
        free_mask: Options of :func:`~mmdet_plugins.ops.free_mask.free_masks`.
        data_preprocessor: As for other detectors.
        init_cfg: As for other detectors.
    """

    def __init__(
        self,
        backbone: dict,
        level: int = -1,
        free_mask: dict | None = None,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(data_preprocessor, init_cfg)
        self.backbone = MODELS.build(backbone)
        self.level = level
        self.free_mask = dict(free_mask or {})
        self._unloaded = {name for name, _ in self.backbone.named_parameters()}
        for name, module in self.backbone.named_modules():
            note = partial(self._note_loaded, name, module)
            module._register_load_state_dict_pre_hook(note)

    def _note_loaded(self, name: str, module: nn.Module, state_dict: dict, prefix: str, *_) -> None:
        for own, parameter in module.named_parameters(recurse=False):
            given = state_dict.get(prefix + own)
            if given is not None and given.shape == parameter.shape:
                self._unloaded.discard(f'{name}.{own}'.lstrip('.'))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        if not any(key.startswith(f'{prefix}backbone.') for key in state_dict):
            for name in self.backbone.state_dict():
                if prefix + name in state_dict:
                    state_dict[f'{prefix}backbone.{name}'] = state_dict.pop(prefix + name)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def require_weights(self) -> None:
        """Load what the backbone's ``init_cfg`` names, unless a checkpoint was loaded before.

        Raises:
            RuntimeError: Some parameters of the backbone are still random.
        """
        total = sum(1 for _ in self.backbone.parameters())
        init_cfg = getattr(self.backbone, 'init_cfg', None)
        pretrained = isinstance(init_cfg, dict) and init_cfg.get('type') == 'Pretrained'
        if len(self._unloaded) == total and pretrained:
            self.backbone.init_weights()
        if len(self._unloaded) == total > 0:
            raise RuntimeError(
                'The backbone has random weights, in whose features there are no objects: give '
                'a checkpoint that has its weights, under "backbone." or without a prefix (mim '
                'test mmdet CONFIG --checkpoint FILE), or set model.backbone.init_cfg='
                "dict(type='Pretrained', checkpoint=FILE)."
            )
        if self._unloaded:
            raise RuntimeError(
                f'{len(self._unloaded)} of the {total} parameters of the backbone are random, '
                f'{min(self._unloaded)} for one: what was loaded is of another architecture.'
            )

    def extract_feat(self, batch_inputs: Tensor) -> Tensor:
        """Features [N, C, h, w] of images [N, 3, H, W]."""
        return self.backbone(reordered_on_cpu(batch_inputs, self.backbone))[self.level]

    @torch.no_grad()
    def predict(
        self, batch_inputs: Tensor, batch_data_samples: SampleList, rescale: bool = True
    ) -> SampleList:
        """Fill in ``pred_instances``: also ``embeddings`` [n, C]; and ``dropped`` as metainfo.

        Padding is no key: where images of several sizes share a batch, each keeps the cells that it
        covers.

        Raises:
            RuntimeError: See :meth:`require_weights`.
        """
        self.require_weights()
        features = self.extract_feat(batch_inputs)
        groups = defaultdict(list)
        for i, sample in enumerate(batch_data_samples):
            cells = tuple(
                math.ceil(length * cells / padded)
                for length, cells, padded in zip(
                    sample.img_shape[:2], features.shape[2:], batch_inputs.shape[2:], strict=True
                )
            )
            image_hw = sample.ori_shape if rescale else sample.img_shape
            groups[cells, tuple(image_hw[:2])].append(i)
        for ((height, width), image_hw), members in groups.items():
            part = features if len(groups) == 1 else features[members, :, :height, :width]
            for i, found in zip(members, free_masks(part, image_hw, **self.free_mask), strict=True):
                batch_data_samples[i].pred_instances = InstanceData(
                    bboxes=found.boxes_xyxy,
                    scores=found.scores,
                    labels=torch.zeros(len(found.rles), dtype=torch.long),
                    masks=EncodedMasks(found.rles),
                    embeddings=found.embeddings,
                )
                batch_data_samples[i].set_metainfo(dict(dropped=found.dropped))
        return batch_data_samples

    def loss(self, batch_inputs: Tensor, batch_data_samples: SampleList) -> dict:
        """Not there."""
        raise NotImplementedError('Free Mask learns nothing: test it, do not train it.')

    def _forward(self, batch_inputs: Tensor, batch_data_samples: SampleList | None = None) -> tuple:
        return (self.extract_feat(batch_inputs),)
