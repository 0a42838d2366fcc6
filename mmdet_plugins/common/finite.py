"""A loss that is not finite ends the training at once, with its name and its images."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def require_finite(losses: Mapping[str, Tensor], img_metas: Sequence[Mapping]) -> None:
    """Check scalar losses of a batch, in one transfer from the device.

    Raises:
        FloatingPointError: One is not finite; its name, value and the ids (or paths) of the images
            are told.
    """
    values = torch.stack([loss.detach().float() for loss in losses.values()]).tolist()
    bad = [
        f'{name} is {value}'
        for name, value in zip(losses, values, strict=True)
        if not math.isfinite(value)
    ]
    if bad:
        images = ', '.join(
            str(meta.get('img_id', meta.get('img_path', 'unknown'))) for meta in img_metas
        )
        raise FloatingPointError(
            f'{" and ".join(bad)} in the batch of images {images}: look at these images and their '
            'annotations, lower the learning rate, or clip the gradient'
        )
