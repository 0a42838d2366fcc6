"""Two views of an image, and where in it they lie."""

from collections.abc import Sequence

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmdet.registry import TRANSFORMS
from torch import Tensor
from torchvision.transforms import v2


@TRANSFORMS.register_module()
class DenseCLTwoViews(BaseTransform):
    """Two random views by torchvision, with the augmentation of MoCo-v2 (section 5.3).

    Takes ``img`` (uint8, BGR) and returns a sample for :class:`DenseCLDataPreprocessor`:

    - ``inputs``: uint8 [2 pairs, 3, size, size], RGB;
    - ``frames_xyxy``: float [2 pairs, 4], for each view the image points (x, y), in pixels, that
      its upper left and lower right corners show; x1 > x2 if it is flipped.

    Args:
        size: Side of a view, px.
        scale: Range of the share of the image's area that a view shows.
        ratio: Range of its aspect ratio.
        jitter: Strengths of changes in brightness, contrast, saturation and hue.
        jitter_prob: How often they change.
        grey_prob: How often a view is grey.
        blur_sigma: Range of the blur's sigma, px of the view.
        blur_prob: How often it is blurred.
        flip_prob: How often it is flipped, left to right.
        pairs: Of views, of an image.
        seed: With it, the views of the image ``img_id`` are the same in every run.
    """

    def __init__(
        self,
        size: int = 224,
        scale: tuple[float, float] = (0.2, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        jitter: Sequence[float] = (0.4, 0.4, 0.4, 0.1),
        jitter_prob: float = 0.8,
        grey_prob: float = 0.2,
        blur_sigma: tuple[float, float] = (0.1, 2.0),
        blur_prob: float = 0.5,
        flip_prob: float = 0.5,
        pairs: int = 1,
        seed: int | None = None,
    ) -> None:
        self.size = size
        self.pairs = pairs
        self.seed = seed
        self.flip_prob = flip_prob
        self.crop = v2.RandomResizedCrop(size, scale, ratio, antialias=True)
        radius = int(np.ceil(4 * blur_sigma[1]))
        self.appearance = v2.Compose(
            [
                v2.RandomApply([v2.ColorJitter(*jitter)], jitter_prob),
                v2.RandomGrayscale(grey_prob),
                v2.RandomApply([v2.GaussianBlur(2 * radius + 1, blur_sigma)], blur_prob),
            ]
        )

    def transform(self, results: dict) -> dict:
        image = np.ascontiguousarray(results['img'][..., ::-1].transpose(2, 0, 1))
        image = torch.from_numpy(image)
        with torch.random.fork_rng(devices=[], enabled=self.seed is not None):
            if self.seed is not None:
                torch.manual_seed(hash((self.seed, results['img_id'])))
            views, frames = zip(*[self._view(image) for _ in range(2 * self.pairs)], strict=True)
        return dict(inputs=torch.stack(views), frames_xyxy=torch.tensor(frames))

    def _view(self, image: Tensor) -> tuple[Tensor, tuple[float, float, float, float]]:
        window = self.crop.make_params([image])
        view = v2.functional.resized_crop(image, **window, size=[self.size] * 2, antialias=True)
        x1, y1 = float(window['left']), float(window['top'])
        x2, y2 = x1 + window['width'], y1 + window['height']
        if torch.rand(()) < self.flip_prob:
            view = v2.functional.horizontal_flip(view)
            x1, x2 = x2, x1
        return self.appearance(view), (x1, y1, x2, y2)
