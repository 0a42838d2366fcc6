"""CARAFE forward and backward: 1 image, 256 channels, 100 x 168 cells, upsampled x2 by 5 x 5 taps.

Float32 features, softmax-normalised masks and one gradient, drawn once, all on the device under
test; both gradients are formed. The peer on the CPU, for which mmcv has no kernel, is the usual
fallback: ``unfold`` at low resolution, a product with the masks of each of the four output
positions, a sum over taps. On CUDA the peer is mmcv's kernel.
"""

import torch
import torch.nn.functional as F
from _case import Case, Floor, Sides
from mmcv.ops import carafe as mmcv_carafe
from torch import Tensor

from mmdet_plugins.ops.carafe import carafe

CHANNELS, HEIGHT, WIDTH = 256, 100, 168
KERNEL, GROUPS, SCALE = 5, 1, 2


def unfold_product(features: Tensor, masks: Tensor) -> Tensor:
    """``[1, C, h, w]`` and ``[1, k*k, s*h, s*w]`` to ``[1, C, s*h, s*w]``."""
    _, c, h, w = features.shape
    patches = F.unfold(features, KERNEL, padding=KERNEL // 2).view(c, KERNEL**2, h, w)
    positions = masks.view(KERNEL**2, h, SCALE, w, SCALE)
    rows = [
        torch.stack([(patches * positions[:, :, y, :, x]).sum(1) for x in range(SCALE)], dim=-1)
        for y in range(SCALE)
    ]
    return torch.stack(rows, dim=2).view(1, c, h * SCALE, w * SCALE)


def _build(device: str) -> Sides:
    rng = torch.Generator().manual_seed(0)
    size = (HEIGHT * SCALE, WIDTH * SCALE)
    features = torch.randn(1, CHANNELS, HEIGHT, WIDTH, generator=rng).to(device).requires_grad_()
    masks = torch.randn(1, KERNEL**2, *size, generator=rng).softmax(1).to(device).requires_grad_()
    gradient = torch.randn(1, CHANNELS, *size, generator=rng).to(device)

    def ours() -> tuple[Tensor, ...]:
        out = carafe(features, masks, KERNEL, GROUPS, SCALE)
        return out.detach(), *torch.autograd.grad(out, (features, masks), gradient)

    def peer() -> tuple[Tensor, ...]:
        if device == 'cuda':
            out = mmcv_carafe(features, masks, KERNEL, GROUPS, SCALE)
        else:
            out = unfold_product(features, masks)
        return out.detach(), *torch.autograd.grad(out, (features, masks), gradient)

    def parity(mine: tuple, theirs: tuple) -> str:
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        return 'output and both gradients equal to 1e-4'

    return Sides(ours, peer, parity)


FLOORS = {'cpu': Floor(ratio=2, memory=1 / 5), 'cuda': Floor(ratio=1 / 1.2)}
CASES = [Case('256 x 100 x 168, x2, k=5, forward and backward', _build, FLOORS)]
