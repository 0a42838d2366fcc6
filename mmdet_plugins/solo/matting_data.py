"""Mattes on disk, in the pipeline, and in the evaluation.

On disk, a set is a folder of images and a folder of mattes, 8-bit grey PNGs of the image's size:
``<stem>.png`` if the image shows one object, ``<stem>/*.png`` if it shows several. In the pipeline
mattes are ``gt_masks``, ``BitmapMasks`` of 0 to 255: mmdet's transforms carry them along, but those
that resize take the nearest pixel, so resize first.

Shapes: G objects of an image, n predictions, ``H W`` the image.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmcv import imfrombytes
from mmcv.transforms import BaseTransform
from mmdet.datasets import BaseDetDataset, CocoDataset
from mmdet.registry import DATASETS, METRICS, TRANSFORMS
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks
from mmengine.evaluator import BaseMetric
from mmengine.fileio import get
from torch import Tensor

from ..ops.matting import (
    absolute_error,
    connectivity_error,
    gradient_error,
    paste_matte,
    squared_error,
)
from ..ops.rle import decode_rle

MIDDLE = 128
"""Pixels of at least this value count as the object's own where a mask is asked for."""
_IMAGES = ('.jpg', '.jpeg', '.png', '.webp')


@DATASETS.register_module()
class SOLOMatteDataset(BaseDetDataset):
    """Images with the mattes of their objects, from two folders.

    Args:
        label: Class of all objects among ``metainfo['classes']``, which are COCO's unless given;
            a person is 0.
        data_prefix, **kwargs: As for ``BaseDetDataset``; ``data_prefix`` names ``img`` and
            ``matte``.

    Raises:
        FileNotFoundError: A folder has no images, or images have no matte.
    """

    METAINFO = CocoDataset.METAINFO

    def __init__(self, *, label: int = 0, data_prefix: dict, **kwargs: Any) -> None:
        self.label = label
        super().__init__(data_prefix=data_prefix, **kwargs)

    def load_data_list(self) -> list[dict]:
        folders = self.data_prefix
        images = sorted(
            path for path in Path(folders['img']).glob('*') if path.suffix.lower() in _IMAGES
        )
        listed, missing = [], []
        for image_id, path in enumerate(images):
            one = Path(folders['matte']) / f'{path.stem}.png'
            paths = [one] if one.is_file() else sorted(one.with_suffix('').glob('*.png'))
            if not paths:
                missing.append(path.name)
            instances = [
                dict(matte_path=str(matte), bbox_label=self.label, ignore_flag=0) for matte in paths
            ]
            listed.append(dict(img_id=image_id, img_path=str(path), instances=instances))
        if missing or not listed:
            raise FileNotFoundError(
                f'{folders["matte"]}: {len(missing)} images have no matte <stem>.png or '
                f'<stem>/*.png, among them {", ".join(missing[:3])}.'
                if missing
                else f'{folders["img"]}: there are no images ({", ".join(_IMAGES)}).'
            )
        return listed


@TRANSFORMS.register_module()
class SOLOLoadMattes(BaseTransform):
    """Load the mattes of a :class:`SOLOMatteDataset`, with boxes and labels.

    Objects without a pixel of at least one half are left out. For the evaluation load them after
    the image was resized, as they have to be those of the original.

    Args:
        binary: Give ordinary masks, 1 where a matte is at least one half.
        backend_args: Of mmengine's file backend.
    """

    def __init__(self, binary: bool = False, backend_args: dict | None = None) -> None:
        self.binary = binary
        self.backend_args = backend_args

    def transform(self, results: dict) -> dict:
        found = [
            (read_matte(instance['matte_path'], self.backend_args), instance['bbox_label'])
            for instance in results['instances']
        ]
        if wrong := [matte.shape for matte, _ in found if matte.shape != results['ori_shape'][:2]]:
            raise ValueError(
                f'{results["img_path"]}: the image has {results["ori_shape"][:2]} pixels (h, w), '
                f'but a matte {wrong[0]}.'
            )
        set_mattes(results, found, results['ori_shape'][:2])
        if self.binary:
            masks = results['gt_masks'].masks
            np.greater_equal(masks, MIDDLE, out=masks, casting='unsafe')
        return results


@TRANSFORMS.register_module()
class SOLOPasteMattes(BaseTransform):
    """Paste objects from (image, matte) pairs over an image; its own masks become mattes.

    Masks that are there already, 0 or 1, become mattes without transitions, as those of LVIS in
    section 4.3.4, and lose what is covered; crowds go. The colours of an object's
    image are taken as its own: where pairs are photographs and not cut-outs, estimate them before
    (:func:`~mmdet_plugins.ops.matting.estimate_foreground`).

    Args:
        pairs: Config of a :class:`SOLOMatteDataset`.
        num: Least and largest number of objects pasted.
        scale: Least and largest height or width of a pasted object, whichever is the larger part
            of the image's, as this part.
    """

    def __init__(
        self,
        pairs: dict,
        num: tuple[int, int] = (1, 3),
        scale: tuple[float, float] = (0.3, 0.9),
    ) -> None:
        self.pairs = DATASETS.build(pairs)
        self.num = num
        self.scale = scale

    def transform(self, results: dict) -> dict:
        image = results['img']
        mattes, labels = [], []
        if 'gt_masks' in results:
            single = ~results['gt_ignore_flags']
            mattes = [*(results['gt_masks'].to_ndarray()[single] * np.uint8(255))]
            labels = results['gt_bboxes_labels'][single].tolist()
        for _ in range(np.random.randint(self.num[0], self.num[1] + 1)):
            info = self.pairs.get_data_info(np.random.randint(len(self.pairs)))
            instance = info['instances'][np.random.randint(len(info['instances']))]
            front = imfrombytes(get(info['img_path']))
            matte = read_matte(instance['matte_path'])
            front, matte = self._cut_out(front, matte, image.shape[:2])
            # At least half of the object's height and width stay inside.
            place = [
                np.random.randint(-(side // 2), max(whole - side // 2, 1 - side // 2))
                for side, whole in zip(matte.shape, image.shape[:2], strict=True)
            ]
            image, mattes = paste_matte(image, mattes, front, matte, place)
            labels.append(instance['bbox_label'])
        results['img'] = image
        set_mattes(results, list(zip(mattes, labels, strict=True)), image.shape[:2])
        return results

    def _cut_out(
        self, front: np.ndarray, matte: np.ndarray, image_hw: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Box of an object, resized for an image, mirrored half of the time."""
        left, top, width, height = cv2.boundingRect(matte)
        window = (slice(top, top + max(height, 1)), slice(left, left + max(width, 1)))
        part = max(height / image_hw[0], width / image_hw[1], 1e-3)
        factor = np.random.uniform(*self.scale) / part
        size = tuple(max(1, round(side * factor)) for side in matte[window].shape[::-1])
        method = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
        front, matte = (cv2.resize(x[window], size, interpolation=method) for x in (front, matte))
        if np.random.rand() < 0.5:
            front, matte = front[:, ::-1], matte[:, ::-1]
        return front, matte


def read_matte(path: str, backend_args: dict | None = None) -> np.ndarray:
    """A matte from its file, uint8 [H, W]."""
    matte = imfrombytes(get(path, backend_args=backend_args), flag='unchanged')
    if matte is None or matte.ndim != 2 or matte.dtype != np.uint8:
        raise ValueError(f'{path}: a matte is an image of one 8-bit channel, without transparency.')
    return matte


def set_mattes(
    results: dict, found: Sequence[tuple[np.ndarray, int]], image_hw: tuple[int, int]
) -> None:
    """Set masks, boxes, labels and flags from mattes and labels; drop what is hardly there."""
    found = [(matte, label) for matte, label in found if (matte >= MIDDLE).any()]
    boxes = []
    for matte, _ in found:
        left, top, width, height = cv2.boundingRect((matte >= MIDDLE).astype(np.uint8))
        boxes.append([left, top, left + width, top + height])
    stack = np.array([matte for matte, _ in found], np.uint8).reshape(-1, *image_hw)
    results['gt_masks'] = BitmapMasks(stack, *image_hw)
    results['gt_bboxes'] = HorizontalBoxes(np.array(boxes, np.float32).reshape(-1, 4))
    results['gt_bboxes_labels'] = np.array([label for _, label in found], np.int64)
    results['gt_ignore_flags'] = np.zeros(len(found), bool)


@METRICS.register_module()
class SOLOMattingMetric(BaseMetric):
    """SAD, MSE, gradient and connectivity error of each object's matte (Rhemann et al., 2009).

    Each annotated object takes the prediction that overlaps it most, with an IoU of soft areas
    above 0.5 and nobody else's; an object without one is compared to an empty matte. Values are
    means over objects, of sums over the whole image; ``SAD``, ``Grad`` and ``Conn`` in thousands,
    as tables have them. ``recall`` is the share of objects that found a prediction; predictions
    that no object takes cost nothing.

    Args:
        source: What is scored: ``'mattes'``, uint8 [n, H, W], or ``'masks'``, bool or RLE.
        **kwargs: As for ``BaseMetric``.
    """

    default_prefix = 'matting'

    def __init__(self, source: str = 'mattes', **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.source = source

    def process(self, data_batch: Any, data_samples: Sequence[Mapping]) -> None:
        """Score images, whose ``gt_instances`` have the mattes as masks, in original pixels."""
        for sample in data_samples:
            truths = sample['gt_instances']['masks'].masks.astype(np.float32) / 255
            mattes = self._found(sample['pred_instances'], truths.shape[1:])
            partner = match_mattes(mattes, truths)
            errors = []
            for truth, index in zip(truths, partner, strict=True):
                matte = mattes[index] if index >= 0 else np.zeros_like(truth)
                errors.append(
                    (
                        absolute_error(matte, truth) / 1000,
                        squared_error(matte, truth),
                        gradient_error(matte, truth) / 1000,
                        connectivity_error(matte, truth) / 1000,
                        index >= 0,
                    )
                )
            self.results.append(errors)  # one entry an image: ranks repeat some

    def _found(self, instances: Mapping, image_hw: tuple[int, int]) -> np.ndarray:
        found = instances[self.source]
        mattes = found.cpu().numpy() if isinstance(found, Tensor) else decode_rle(found, image_hw)
        if mattes.dtype == np.uint8:
            mattes = mattes.astype(np.float32) / 255
        if mattes.shape[1:] != image_hw:
            raise ValueError(
                f'the annotation has {image_hw} pixels (h, w), the prediction {mattes.shape[1:]}: '
                'load mattes after the image was resized.'
            )
        return mattes.astype(np.float32)

    def compute_metrics(self, results: list) -> dict[str, float]:
        errors = [one for image in results for one in image]
        values = np.mean(errors, axis=0) if errors else np.full(5, np.nan)
        return dict(zip(('SAD', 'MSE', 'Grad', 'Conn', 'recall'), values.tolist(), strict=True))


def match_mattes(mattes: np.ndarray, truths: np.ndarray) -> list[int]:
    """The prediction of each object, or -1: [n, H, W] and [G, H, W] in [0, 1] -> G indices."""
    flat, true = (x.reshape(len(x), np.prod(x.shape[1:])) for x in (mattes, truths))
    partner = [-1] * len(truths)
    if not len(flat):
        return partner
    common = np.array([np.minimum(flat, one).sum(1) for one in true]).reshape(len(true), len(flat))
    iou = common / np.maximum(flat.sum(1) + true.sum(1)[:, None] - common, 1e-9)
    taken: set[int] = set()
    for place in iou.ravel().argsort(kind='stable')[::-1].tolist():
        truth, index = divmod(place, len(flat))
        if iou[truth, index] <= 0.5:
            break
        if partner[truth] < 0 and index not in taken:
            partner[truth] = index
            taken.add(index)
    return partner
