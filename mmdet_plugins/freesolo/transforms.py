"""Pseudo-labels on their way to the head: loaded with embeddings, copied and pasted, packed.

Shapes: G objects of one image, ``H W`` its size, E of an embedding.
"""

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmcv.transforms.utils import cache_randomness
from mmdet.datasets.transforms import LoadAnnotations, PackDetInputs
from mmdet.registry import TRANSFORMS
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks

from ..ops.rle import decode_rle
from .datasets import open_embeddings


@TRANSFORMS.register_module()
class FreeSOLOLoadAnnotations(LoadAnnotations):
    """Boxes, labels, masks and embeddings of pseudo-labels.

    Masks are decoded in one call, where the stock transform takes one for each. Embeddings,
    ``gt_embeddings`` float32 [G, E], come if :class:`.FreeSOLODataset` has them.
    """

    def __init__(self) -> None:
        super().__init__(with_mask=True)

    def transform(self, results: dict) -> dict:
        self._load_bboxes(results)
        self._load_labels(results)
        size = results['height'], results['width']
        masks = decode_rle([instance['mask'] for instance in results['instances']], size)
        results['gt_masks'] = BitmapMasks(masks.view(np.uint8), *size)
        if path := results.get('embeddings_path'):
            rows = [instance['embedding_row'] for instance in results['instances']]
            results['gt_embeddings'] = open_embeddings(path)[rows].astype(np.float32)
        return results


@TRANSFORMS.register_module()
class FreeSOLOPackInputs(PackDetInputs):
    """mmdet's, with embeddings as ``gt_instances.embeddings``."""

    mapping_table = {**PackDetInputs.mapping_table, 'gt_embeddings': 'embeddings'}


@TRANSFORMS.register_module()
class FreeSOLOCopyPaste(BaseTransform):
    """Paste some objects of another image (Ghiasi et al., CVPR 2021), with all they have.

    Used in mmdet's ``MultiImageMixDataset``, as its ``CopyPaste``, which turns the image into int64
    (eight times the bytes for workers and device to move), wants both images of one size and
    forgets the embeddings. As in the released code the other image is resized to this one, any
    number of its objects up to all is pasted, but none that would hide more than ``max_hidden`` of
    an object.

    Args:
        prob: How often anything is pasted.
        max_hidden: Largest part of an object that one pasted object may cover.
    """

    def __init__(self, prob: float = 1.0, max_hidden: float = 0.5) -> None:
        self.prob = prob
        self.max_hidden = max_hidden

    def get_indexes(self, dataset: Sequence) -> int:
        """The other image."""
        return np.random.randint(len(dataset))

    @cache_randomness
    def _choose(self, count: int) -> np.ndarray:
        """Which of so many objects are copied."""
        if np.random.rand() >= self.prob:
            return np.zeros(0, int)
        return np.random.permutation(count)[: np.random.randint(count + 1)]

    def transform(self, results: dict) -> dict:
        """Takes the other image from ``mix_results``."""
        (source,) = results['mix_results']
        chosen = self._choose(len(source['gt_masks']))
        height, width = results['img'].shape[:2]
        masks, kept = results['gt_masks'].masks, []
        pasted = np.zeros((0, height, width), np.uint8)
        if len(chosen):
            pasted = np.stack(
                [
                    cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)
                    for mask in source['gt_masks'].masks[chosen]
                ]
            )
            areas = np.count_nonzero(masks, (1, 2))
            seen, areas = masks[areas > 0], areas[areas > 0]
            kept = [
                i
                for i, mask in enumerate(pasted)
                if (np.count_nonzero(seen & mask, (1, 2)) < self.max_hidden * areas).all()
                and mask.any()
            ]
        if not kept:
            return results
        pasted, chosen = pasted[kept], chosen[kept]
        cover = pasted.any(0)
        image = cv2.resize(source['img'], (width, height), interpolation=cv2.INTER_LINEAR)
        np.copyto(results['img'], image, where=cover[..., None])
        masks = np.concatenate([masks & ~cover, pasted])
        left = masks.any((1, 2))
        results['gt_masks'] = BitmapMasks(masks[left], height, width)
        results['gt_bboxes'] = _boxes(masks[left])
        for key in ('gt_bboxes_labels', 'gt_ignore_flags', 'gt_embeddings'):
            if key in results:
                results[key] = np.concatenate([results[key], source[key][chosen]])[left]
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}(prob={self.prob}, max_hidden={self.max_hidden})'


@TRANSFORMS.register_module()
class FreeSOLOTwoViews(FreeSOLOCopyPaste):
    """Two packed samples of an image, as the released code trains on; the thesis has one.

    One has strong photometric changes (those of SimCLR, and three rectangles of noise) and objects
    pasted; the other is the image as it came. Takes the place of :class:`FreeSOLOCopyPaste` and
    :class:`FreeSOLOPackInputs`; :class:`.FreeSOLODataPreprocessor` makes one batch of both.

    Args:
        **kwargs: As for :class:`FreeSOLOCopyPaste`.
    """

    def __init__(self, **kwargs: float) -> None:
        from torchvision.transforms import v2  # which nothing else here needs

        super().__init__(**kwargs)
        self.pack = FreeSOLOPackInputs()
        self.strong = v2.Compose(
            [
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
                v2.RandomGrayscale(0.2),
                v2.RandomApply([v2.GaussianBlur(17, (0.1, 2.0))], 0.5),
                v2.ToDtype(torch.float32, scale=True),
                v2.RandomErasing(0.7, (0.05, 0.2), (0.3, 3.3), value='random'),
                v2.RandomErasing(0.5, (0.02, 0.2), (0.1, 6), value='random'),
                v2.RandomErasing(0.3, (0.02, 0.2), (0.05, 8), value='random'),
            ]
        )

    def transform(self, results: dict) -> dict:
        """Give ``inputs`` and ``data_samples`` of the strong view and of the plain one."""
        plain = self.pack(dict(results))
        image = torch.from_numpy(results['img'][..., ::-1].transpose(2, 0, 1).copy())
        image = (self.strong(image) * 255).round().remainder(256)  # as the released cast wraps
        image = image.byte().numpy()[::-1].transpose(1, 2, 0)
        strong = self.pack(super().transform(dict(results, img=np.ascontiguousarray(image))))
        return {key: [strong[key], plain[key]] for key in ('inputs', 'data_samples')}


def _boxes(masks: np.ndarray) -> HorizontalBoxes:
    """Boxes of masks [G, H, W]."""
    boxes = np.array([cv2.boundingRect(mask) for mask in masks], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return HorizontalBoxes(torch.from_numpy(boxes))
