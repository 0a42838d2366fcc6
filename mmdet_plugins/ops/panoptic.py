"""Panoptic maps: merged from instances and stuff, kept as PNGs of segment ids, and scored.

Shapes: N instances, ``H W`` the image, K classes, things before stuff. A *panoptic map* is what
mmdet calls one, int64 ``[H, W]`` of ``label + INSTANCE_OFFSET * instance``: instances count from 1,
stuff has instance 0, and the label K is void. An *id map* is COCO's: 0 is void, and what else an
id stands for is listed beside it.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import hotcoco
import numpy as np
import torch
from hotcoco.panoptic import PanopticEval
from torch import Tensor

INSTANCE_OFFSET = 1000
VOID_ID = 0


def merge_panoptic(
    masks: Tensor,
    scores: Tensor,
    labels: Tensor,
    semantic: Tensor,
    *,
    num_things: int,
    num_classes: int,
    min_score: float = 0.5,
    max_overlap: float = 0.5,
    min_stuff_area: int = 4096,
) -> Tensor:
    """Lay instances over each other, best first, and fill what is left with stuff.

    As in Panoptic-FPN (Kirillov et al., CVPR 2019, section 3), which thesis section 4.3.3 follows:
    an instance goes if too much of it is taken already, and keeps what is free of it otherwise;
    stuff gets the pixels of no instance, unless they are too few. The host waits for the device
    twice, whatever N: for the choice of the instances above ``min_score`` and for stuff's areas.

    Args:
        masks: ``[N, H, W]`` bool.
        scores: ``[N]``.
        labels: ``[N]`` int64, below ``num_things``.
        semantic: ``[H, W]`` int64, a label for each pixel; those of things, and whatever is not
            below ``num_classes``, become void where no instance lies.
        num_things: Classes with instances; those from here to ``num_classes`` are stuff.
        num_classes: K.
        min_score: Instances below it are left out.
        max_overlap: Share of its pixels that an instance may lose to better ones.
        min_stuff_area: Pixels that a stuff class must cover in all.

    Returns:
        The panoptic map. Instances are counted in the order of scores, those dropped included.
    """
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order] >= min_score]
    owner = torch.zeros_like(semantic, dtype=torch.int16)
    free = torch.ones_like(semantic, dtype=torch.bool)
    for rank, mask in enumerate(masks[order], start=1):
        area, mine = mask.count_nonzero(), mask & free
        mine &= area - mine.count_nonzero() <= max_overlap * area
        owner.add_(mine, alpha=rank)  # ten times faster on the CPU than filling by a mask
        free ^= mine
    owner = owner.long()

    is_stuff = (semantic >= num_things) & (semantic < num_classes) & free
    stuff = semantic.where(is_stuff, num_classes)
    too_small = stuff.flatten().bincount(minlength=num_classes + 1) < min_stuff_area
    label_of = torch.arange(num_classes + 1, device=stuff.device).masked_fill_(
        too_small, num_classes
    )
    ranks = torch.arange(1, len(order) + 1, device=order.device)
    instance_of = torch.cat((order.new_zeros(1), labels[order] + INSTANCE_OFFSET * ranks))
    return torch.where(free, label_of[stuff], instance_of[owner])


def panoptic_to_ids(panoptic: np.ndarray, num_classes: int) -> tuple[np.ndarray, dict[int, int]]:
    """Turn a panoptic map into an id map and the label of each of its segments."""
    is_void = panoptic % INSTANCE_OFFSET == num_classes
    ids = np.where(is_void, VOID_ID, panoptic + 1)
    return ids, {i: (i - 1) % INSTANCE_OFFSET for i in np.unique(ids).tolist() if i != VOID_ID}


def encode_id_png(ids: np.ndarray) -> bytes:
    """Write an id map as COCO does: ``id = R + 256 G + 256² B``."""
    ids = np.asarray(ids)
    if ids.size and (ids.min() < 0 or ids.max() >= 1 << 24):
        raise ValueError(f'segment ids must fit into 24 bits, these reach {ids.max()}.')
    bgr = np.stack((ids >> 16, ids >> 8, ids), -1).astype(np.uint8)
    return cv2.imencode('.png', bgr)[1].tobytes()


def decode_id_png(data: bytes) -> np.ndarray:
    """Read an id map, int32 ``[H, W]``.

    Raises:
        ValueError: The bytes are no image of three 8-bit channels.
    """
    bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if data else None
    if bgr is None:
        raise ValueError('this is no image, or a damaged one.')
    if bgr.ndim != 3 or bgr.shape[2] != 3 or bgr.dtype != np.uint8:
        raise ValueError(
            f'segment ids need three 8-bit channels, this has {bgr.shape[2:] or (1,)} of '
            f'{bgr.dtype}; was it saved with a palette, or as labels?'
        )
    return bgr.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)


def segment_rles(ids: np.ndarray) -> dict[int, dict]:
    """COCO RLE of every segment of an id map but void, with plain (uncompressed) counts.

    One pass over the map finds the runs of all segments; no mask is built.
    """
    columns = ids.T.ravel()
    starts = np.concatenate(([0], np.flatnonzero(columns[1:] != columns[:-1]) + 1))
    ends = np.append(starts[1:], columns.size)
    owners = columns[starts]
    order = owners.argsort(kind='stable')
    segments, first = np.unique(owners[order], return_index=True)
    rles = {}
    for segment, runs in zip(segments.tolist(), np.split(order, first[1:]), strict=True):
        if segment != VOID_ID:
            edges = np.stack((starts[runs], ends[runs]), 1).ravel()
            counts = np.diff(edges, prepend=0, append=columns.size)
            rles[segment] = {'size': [*ids.shape], 'counts': counts.tolist()}
    return rles


@dataclass(frozen=True)
class Segments:
    """What one image was divided into.

    Attributes:
        ids: Id map ``[H, W]``.
        category_of: Category id of every segment in the map.
        crowd: Annotated segments in which predictions are ignored.
    """

    ids: np.ndarray
    category_of: Mapping[int, int]
    crowd: Collection[int] = ()


class PanopticQuality:
    """PQ, SQ and RQ (Kirillov et al., "Panoptic Segmentation", CVPR 2019) of a stream of images.

    Segments are matched by ``hotcoco`` image by image as ``panopticapi`` does: above an IoU of
    0.5, where void pixels of the truth leave a prediction's area; a prediction that matches
    nothing and lies by more than half on void, or on the crowd of its class, does not count.
    What is kept is four numbers for each class of an image. Instances can be pickled;
    :meth:`merge` joins those of several processes. Not for use in a process forked off one that
    has evaluated before: hotcoco's threads do not survive a fork.

    Args:
        categories: COCO panoptic categories: ``id``, ``name`` and ``isthing``.
    """

    def __init__(self, categories: Iterable[Mapping[str, Any]]) -> None:
        self.categories = [
            {'id': c['id'], 'name': str(c['name']), 'isthing': int(c['isthing'])}
            for c in categories
        ]
        # By image and category: true positives, false positives, false negatives, matched IoUs.
        self._counts: dict[int, dict[int, tuple[int, int, int, float]]] = {}

    @property
    def image_ids(self) -> set[int]:
        return {*self._counts}

    def update(self, image_id: int, truth: Segments, found: Segments) -> None:
        """Match the segments of one image.

        An image seen before is passed over: a distributed sampler repeats some to fill its ranks.

        Raises:
            ValueError: The maps differ in size, a map and its list of segments do, or a category
                is unknown.
        """
        if image_id in self._counts:
            return
        where = f'Image {image_id}'
        if truth.ids.shape != found.ids.shape:
            raise ValueError(
                f'{where}: the annotation has {truth.ids.shape} pixels (h, w), the prediction '
                f'{found.ids.shape}: predict in original pixels.'
            )
        sides = [
            self._as_coco(truth, f'{where}, annotation'),
            self._as_coco(found, f'{where}, prediction'),
        ]
        evaluation = PanopticEval(*sides)
        evaluation.evaluate()
        self._counts[image_id] = {
            category: tuple(result[key] for key in ('tp', 'fp', 'fn', 'iou'))
            for category, result in evaluation.results()['per_class'].items()
            if result['pq'] >= 0
        }

    def _as_coco(self, segments: Segments, where: str) -> dict:
        rles = segment_rles(segments.ids)
        category_of = segments.category_of
        if wrong := sorted(rles.keys() ^ category_of.keys()):
            raise ValueError(
                f'{where}: the segments {wrong[:5]} are in the map or in the list of segments, '
                'but not in both.'
            )
        if unknown := {*category_of.values()} - {c['id'] for c in self.categories}:
            raise ValueError(f'{where}: there are no categories {sorted(unknown)[:5]}.')
        height, width = segments.ids.shape
        return {
            'images': [{'id': 1, 'height': height, 'width': width}],
            'categories': self.categories,
            'annotations': [
                {
                    'id': segment,
                    'image_id': 1,
                    'category_id': category_of[segment],
                    'segmentation': rles[segment],
                    'iscrowd': int(segment in segments.crowd),
                }
                for segment in category_of
            ],
        }

    @classmethod
    def merge(cls, parts: Iterable['PanopticQuality']) -> 'PanopticQuality':
        """Join parts that each saw a share of the images, as if one had seen all of them."""
        first, *rest = parts
        merged = cls(first.categories)
        for part in (first, *rest):
            merged._counts.update(part._counts)
        return merged

    def per_class(self) -> dict[int, tuple[float, float, float]]:
        """PQ, SQ and RQ by category id, of the categories that occur on either side."""
        totals = defaultdict(lambda: np.zeros(4))
        for image_id in sorted(self._counts):
            for category, counts in self._counts[image_id].items():
                totals[category] += counts
        return {
            c['id']: hotcoco.metrics.panoptic_quality(iou, int(tp), int(fp), int(fn))
            for c in self.categories
            if c['id'] in totals
            for tp, fp, fn, iou in [totals[c['id']]]
        }

    def compute(self) -> dict[str, float]:
        """Means over categories, in [0, 1]: ``PQ SQ RQ``, of things ``_th``, of stuff ``_st``.

        NaN where no category occurs.
        """
        scores = self.per_class()
        metrics = {}
        for suffix, kinds in (('', (0, 1)), ('_th', (1,)), ('_st', (0,))):
            group = [
                scores[c['id']]
                for c in self.categories
                if c['id'] in scores and c['isthing'] in kinds
            ]
            means = np.mean(group, axis=0) if group else np.full(3, np.nan)
            for name, mean in zip(('PQ', 'SQ', 'RQ'), means.tolist(), strict=True):
                metrics[name + suffix] = mean
        return metrics
