"""A training step of SOLOv2, R50, batch 1, 480 x 640, 100 objects (CUDA: 800 x 1333, 30 objects).

From an image and masks in host memory to updated weights: preprocessing, network, targets, losses,
gradients, their clipping, SGD. Ours and mmdet's are built from ``solov2_r50_fpn_*_coco.py`` of
each, with the same random weights, and step alike; the learning rate is 0, so that all steps are
the same. The image is of smooth random colours, the objects those of ``solo_targets``. On CUDA,
parity is found without TF32 and time is taken with it, as convolutions run by default.
"""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import mmdet
import torch
import torch.nn.functional as F
from _case import Case, Floor, Sides
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config, ConfigDict
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from solo_targets import blobs
from torch import nn

CONFIGS = {
    'ours': Path(__file__).parents[2] / 'configs/solov2/solov2_r50_fpn_8xb2-1x_coco.py',
    'peer': Path(mmdet.__file__).parent / '.mim/configs/solov2/solov2_r50_fpn_1x_coco.py',
}
IMAGE_HW = {'cpu': (480, 640), 'cuda': (800, 1333)}
OBJECTS = {'cpu': 100, 'cuda': 30}


def build_pair(device: str) -> tuple[nn.Module, nn.Module, ConfigDict]:
    """Ours and mmdet's, initialised as for training, but for the backbone; and our optimiser's."""
    torch.manual_seed(0)
    ours, peer = (Config.fromfile(file) for file in CONFIGS.values())
    init_default_scope('mmdet')
    MMLogger.get_current_instance().setLevel('WARNING')  # the origin of each weight
    models = []
    for cfg in (ours, peer):
        cfg.model.backbone.init_cfg = None
        models.append(MODELS.build(cfg.model).to(device))
    models[0].init_weights()
    models[1].load_state_dict(models[0].state_dict())
    return *models, ours.optim_wrapper


def build_batch(device: str) -> dict:
    """What a data loader gives: uint8 BGR, masks in ``BitmapMasks``."""
    image_hw = IMAGE_HW[device]
    sample = DetDataSample(gt_instances=blobs(0, OBJECTS[device], 'cpu', image_hw))
    sample.set_metainfo(dict(img_shape=image_hw, ori_shape=image_hw, scale_factor=(1.0, 1.0)))
    rng = torch.Generator().manual_seed(0)
    colours = 128 + 64 * torch.randn(1, 3, 8, 10, generator=rng)
    image = F.interpolate(colours, image_hw, mode='bicubic')[0].clamp(0, 255).byte()
    return dict(inputs=[image], data_samples=[sample])


def exactly(call: Callable[[], Any]) -> Any:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return call()


def _step(model: nn.Module, optimiser: ConfigDict, batch: dict) -> Callable[[], dict]:
    wrapper = build_optim_wrapper(model.train(), optimiser)
    return lambda: model.train_step(batch, wrapper)


def _build(device: str) -> Sides:
    *models, optimiser = build_pair(device)
    optimiser.optimizer.lr = 0.0
    ours, peer = (_step(model, deepcopy(optimiser), build_batch(device)) for model in models)

    def parity(*_: dict) -> str:
        mine, theirs = exactly(ours), exactly(peer)
        for name in ('loss_mask', 'loss_cls'):
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=0)
        return f'losses {mine["loss_mask"]:.4f}, {mine["loss_cls"]:.4f} equal to 1e-4'

    return Sides(ours, peer, parity)


FLOORS = {'cpu': Floor(ratio=1.3), 'cuda': Floor(ratio=1.5)}
CASES = [Case('SOLOv2 R50, one step', _build, FLOORS)]
