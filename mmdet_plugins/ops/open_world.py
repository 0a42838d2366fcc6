"""Class-agnostic average precision and recall of boxes and masks, streamed and mergeable.

Shapes: G annotated objects and D detections of one image; T = 10 IoU thresholds (0.50:0.05:0.95),
A = 4 area ranges (all, small, medium, large), K detection budgets.

Every object is of the one class "object" (pycocotools with ``useCats=0``). Boxes and masks are
matched by ``hotcoco`` image by image as they arrive; what is kept is the outcome of the matching,
never a mask. Deviations from pycocotools: an annotation whose id is 0 can be found (there it is
always missed), and AP is COCO's at 100 detections an image whatever the budgets of AR are.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import hotcoco
import numpy as np
from hotcoco import mask as rle_ops

from .boundary import boundary_iou
from .coco_json import (
    Detections,
    JsonFile,
    Objects,
    base_category_ids,
    by_image,
    listed,
    load_coco,
    load_results,
    to_detections,
    to_objects,
)
from .rle import area as mask_area

IOU_TYPES = ('bbox', 'segm', 'boundary')
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
AREAS = {
    'all': (0.0, 1e10),
    'small': (0.0, 32.0**2),
    'medium': (32.0**2, 96.0**2),
    'large': (96.0**2, 1e10),
}
AP_BUDGET = 100
_CATEGORY = {'id': 1, 'name': 'object'}
# An area beyond every range: COCO's matching then ignores the object without taking it for a crowd.
_IGNORED_AREA = 1e11


class OpenWorldEvaluator:
    """Class-agnostic AP and AR@k of a stream of images.

    With ``split=True`` three sets of numbers come out: over all objects, over novel objects
    (``novel_``) and over base objects (``base_``). In the latter two the objects of the other part
    are ignored, and so are the detections on them: those that hit one (greedy, in the order of
    scores, at IoU 0.5, an object of the evaluated part going first) are taken out before the
    budget of k detections is counted, as in OLN (Kim et al., "Learning Open-World Object Proposals
    without Learning to Classify", section 4). Deviation from OLN's code: the detections taken out
    are decided once, over objects of all areas, and then take part in no matching.

    Instances can be pickled; :meth:`merge` joins those of several processes. Not for use in a
    process forked off one that has evaluated before: hotcoco's threads do not survive a fork.

    Args:
        iou_types: Of ``'bbox'``, ``'segm'`` and ``'boundary'`` (:mod:`.boundary`).
        max_dets: Budgets k of AR@k.
        split: Also evaluate base and novel objects apart.
        tide: Also sort the errors of the first 100 detections an image into TIDE's kinds (Bolya et
            al., ECCV 2020), for boxes and masks. Keeps all boxes, or RLE masks, in memory.
    """

    def __init__(
        self,
        iou_types: Sequence[str] = ('bbox',),
        max_dets: Sequence[int] = (1, 10, 100),
        split: bool = False,
        tide: bool = False,
    ) -> None:
        unknown = set(iou_types) - set(IOU_TYPES)
        if unknown or not iou_types:
            raise ValueError(f'iou_types must be of {", ".join(IOU_TYPES)}, not {list(iou_types)}.')
        if not max_dets or any(int(k) != k or k < 1 for k in max_dets):
            raise ValueError(f'max_dets must be whole numbers of at least 1, not {list(max_dets)}.')
        self.iou_types = tuple(dict.fromkeys(iou_types))
        self.max_dets = tuple(sorted({int(k) for k in max_dets}))
        self.split = split
        self.image_ids: set[int] = set()
        budgets = tuple(sorted({*self.max_dets, AP_BUDGET}))
        self._engines = {
            (part, t): _GreedyEngine(t, budgets) if t == 'boundary' else _StreamEngine(t, budgets)
            for part in (('', 'novel_', 'base_') if split else ('',))
            for t in self.iou_types
        }
        self._tide = {t: _TideErrors(t) for t in self.iou_types if t != 'boundary'} if tide else {}

    def update(self, image_id: int, objects: Objects, detections: Detections) -> None:
        """Match the detections of one image.

        An image seen before is passed over: a distributed sampler repeats some to fill its ranks.

        Raises:
            ValueError: A box or score is not finite, masks are missing where they are evaluated,
                or the base objects are not marked.
        """
        if image_id in self.image_ids:
            return
        self._check(image_id, objects, detections)
        self.image_ids.add(image_id)
        for (part, iou_type), engine in self._engines.items():
            gts, dets = objects, detections
            if part:
                other = objects.base if part == 'novel_' else ~objects.base
                dets = detections[_off_ignored(iou_type, objects, detections, other)]
                gts = Objects(
                    objects.boxes_xywh,
                    np.where(other, _IGNORED_AREA, objects.areas),
                    objects.crowd,
                    objects.rles,
                )
            engine.update(image_id, gts, dets)
        for errors in self._tide.values():
            errors.update(image_id, objects, detections)

    def _check(self, image_id: int, objects: Objects, detections: Detections) -> None:
        where = f'Image {image_id}'
        if isinstance(image_id, bool) or not isinstance(image_id, int | np.integer):
            raise ValueError(f'{where}: an image id must be a whole number.')
        for name, values in (('box', detections.boxes_xywh), ('score', detections.scores)):
            if len(values) != len(detections):
                raise ValueError(f'{where}: {len(detections)} scores but {len(values)} boxes.')
            if not np.isfinite(values).all():
                raise ValueError(f'{where}: a predicted {name} is not finite.')
        if any(t != 'bbox' for t in self.iou_types):
            for what, side in (('annotations', objects), ('predictions', detections)):
                if side.rles is None or len(side.rles) != len(side):
                    raise ValueError(
                        f'{where}: masks are evaluated, but the {what} lack masks. '
                        "Evaluate 'bbox' only, or supply them."
                    )
        if self.split and objects.base is None:
            raise ValueError(f'{where}: a base/novel split needs base objects to be marked.')

    @classmethod
    def merge(cls, evaluators: Iterable['OpenWorldEvaluator']) -> 'OpenWorldEvaluator':
        """Join evaluators that each saw a share of the images, as if one had seen all of them."""
        first, *rest = evaluators
        merged = cls(first.iou_types, first.max_dets, first.split, bool(first._tide))
        for other in (first, *rest):
            if (other._engines.keys(), other.max_dets) != (first._engines.keys(), first.max_dets):
                raise ValueError('Only evaluators with the same settings can be merged.')
            merged.image_ids |= other.image_ids
        for key, engine in merged._engines.items():
            engine.join([other._engines[key] for other in (first, *rest)])
        for key, errors in merged._tide.items():
            errors.join([other._tide[key] for other in (first, *rest)])
        return merged

    def compute(self) -> dict[str, float]:
        """The metrics so far.

        Returns:
            ``{part}{iou_type}_AP``, ``_AP50``, ``_AP75``, ``_AP_small|medium|large`` (at most 100
            detections an image), ``_AR@{k}`` and ``_AR@{k}_small|medium|large`` for each k;
            if asked for, ``{iou_type}_TIDE_{kind}``, the AP50 that each kind of error costs (Loc,
            Dupe, Bkg, Miss, FP, FN; the two kinds of class errors cannot occur). In [0, 1]; -1
            where there is no object to find.

        Raises:
            ValueError: No image was seen.
        """
        if not self.image_ids:
            raise ValueError('There is nothing to evaluate: no image has been seen.')
        metrics = {}
        suffixes = ['' if area == 'all' else f'_{area}' for area in AREAS]
        for (part, iou_type), engine in self._engines.items():
            name = f'{part}{iou_type}'
            precision, recall = engine.compute()
            metrics[f'{name}_AP'] = _mean(precision[:, 0])
            metrics[f'{name}_AP50'] = _mean(precision[0, :1])
            metrics[f'{name}_AP75'] = _mean(precision[5, :1])
            for a, suffix in enumerate(suffixes[1:], start=1):
                metrics[f'{name}_AP{suffix}'] = _mean(precision[:, a])
            for k in self.max_dets:
                for a, suffix in enumerate(suffixes):
                    found = recall[:, a, engine.budgets.index(k)]
                    metrics[f'{name}_AR@{k}{suffix}'] = _mean(found)
        for iou_type, errors in self._tide.items():
            metrics.update({f'{iou_type}_TIDE_{kind}': v for kind, v in errors.compute().items()})
        return metrics


def _mean(values: np.ndarray) -> float:
    return float(values[values > -1].mean()) if (values > -1).any() else -1.0


def pairwise_iou(iou_type: str, objects: Objects, detections: Detections) -> np.ndarray:
    """``[D, G]`` overlap; with a crowd, intersection over the detection's area."""
    if not len(objects) or not len(detections):
        return np.zeros((len(detections), len(objects)))
    if iou_type == 'bbox':
        boxes = np.asarray(detections.boxes_xywh, np.float64)
        return rle_ops.bbox_iou(boxes, objects.boxes_xywh, objects.crowd)
    if iou_type == 'segm':
        return rle_ops.iou(list(detections.rles), list(objects.rles), objects.crowd)
    return boundary_iou(detections.rles, objects.rles, objects.crowd, min_iou=IOU_THRESHOLDS[0])


def _by_score(detections: Detections) -> np.ndarray:
    return np.argsort(-detections.scores, kind='stable')


def _off_ignored(
    iou_type: str, objects: Objects, detections: Detections, ignored: np.ndarray
) -> np.ndarray:
    """Indices of the detections that do not hit an object of ``ignored`` [G] bool."""
    order = _by_score(detections)
    if not ignored.any():
        return order
    ious = pairwise_iou(iou_type, objects, detections)[order]
    matches = greedy_match(ious, (ignored | objects.crowd)[None], objects.crowd, IOU_THRESHOLDS[:1])
    matches = matches[0, 0]
    return order[~((matches >= 0) & ignored[matches])]


def greedy_match(
    ious: np.ndarray,
    ignored: np.ndarray,
    crowd: np.ndarray,
    thresholds: np.ndarray = IOU_THRESHOLDS,
) -> np.ndarray:
    """COCO's matching: each detection in turn takes the best free object it reaches.

    Objects that count go before ignored ones; among equals the last one wins; a crowd can be taken
    any number of times.

    Args:
        ious: ``[D, G]``, detections in descending order of score.
        ignored: ``[A, G]`` bool, objects that do not count, in each of A views.
        crowd: ``[G]`` bool.
        thresholds: ``[T]``.

    Returns:
        ``[A, T, D]`` int32, the index of the matched object or -1.
    """
    num_dets, num_objects = ious.shape
    views = (len(ignored), len(thresholds))
    matches = np.full((*views, num_dets), -1, dtype=np.int32)
    free = np.ones((*views, num_objects), dtype=bool)
    limits = np.minimum(thresholds, 1 - 1e-10)[None, :, None]
    preference = np.where(ignored, 0.0, 2.0)[:, None, :]  # an IoU is at most 1
    for d in np.flatnonzero((ious >= limits.min()).any(1)):
        near = np.flatnonzero(ious[d] >= limits.min())[::-1]
        iou = ious[d, near]
        rank = np.where(free[..., near] & (iou >= limits), iou + preference[..., near], -1.0)
        best = rank.argmax(-1)
        hit = np.take_along_axis(rank, best[..., None], -1)[..., 0] >= 0
        best = near[best]
        matches[..., d] = np.where(hit, best, -1)
        a, t = np.nonzero(hit)
        taken = best[a, t]
        free[a, t, taken] = crowd[taken]
    return matches


class _StreamEngine:
    """Boxes or masks, matched by hotcoco in small batches of images."""

    batch_size = 32

    def __init__(self, iou_type: str, budgets: tuple[int, ...]) -> None:
        self.iou_type, self.budgets = iou_type, budgets
        params = hotcoco.Params(iou_type)
        params.max_dets = list(budgets)
        params.iou_thrs = IOU_THRESHOLDS.tolist()
        self._stream = hotcoco.StreamingEval([_CATEGORY], iou_type, params=params)
        self._pending: list[tuple[int, list[dict], Any]] = []
        self._next_id = 1

    def update(self, image_id: int, objects: Objects, detections: Detections) -> None:
        truths = _annotations(image_id, objects, self.iou_type == 'segm', self._next_id)
        self._next_id += len(objects)
        if self.iou_type == 'bbox':
            found = np.ones((len(detections), 7))
            found[:, 0] = image_id
            found[:, 1:5] = detections.boxes_xywh
            found[:, 5] = detections.scores
        else:  # without a box, the area of a result is that of its mask
            found = _results(image_id, detections)
        self._pending.append((image_id, truths, found))
        if len(self._pending) >= self.batch_size:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            ids, truths, found = zip(*self._pending, strict=True)
            found = np.concatenate(found) if self.iou_type == 'bbox' else sum(found, [])
            self._stream.update([{'id': i} for i in ids], sum(truths, []), found)
            self._pending.clear()

    def __getstate__(self) -> dict:
        self._flush()
        return self.__dict__

    def join(self, engines: Sequence['_StreamEngine']) -> None:
        for engine in engines:
            engine._flush()
        self._stream = hotcoco.StreamingEval.merge([engine._stream for engine in engines])

    def compute(self) -> tuple[np.ndarray, np.ndarray]:
        """``[T, A]`` average precision at 100 detections and ``[T, A, K]`` recall."""
        self._flush()
        evaluation = hotcoco.StreamingEval.merge([self._stream]).finalize()
        evaluation.accumulate()
        precision = np.asarray(evaluation.eval['precision'])[:, :, 0]
        recall = np.asarray(evaluation.eval['recall'])[:, 0]
        return precision[..., self.budgets.index(AP_BUDGET)].mean(1), recall


class _GreedyEngine:
    """Any overlap that hotcoco does not know, matched by :func:`greedy_match`."""

    def __init__(self, iou_type: str, budgets: tuple[int, ...]) -> None:
        self.iou_type, self.budgets = iou_type, budgets
        # By image: scores [D], true positives and ignored [A, T, D] of its first 100 detections,
        # number of objects [A], and of those found within each budget [T, A, K].
        self._images: dict[int, tuple[np.ndarray, ...]] = {}

    def update(self, image_id: int, objects: Objects, detections: Detections) -> None:
        detections = detections[_by_score(detections)[: self.budgets[-1]]]
        low, high = np.array(list(AREAS.values())).T[:, :, None]
        ignored = objects.crowd | (objects.areas < low) | (objects.areas > high)
        ious = pairwise_iou(self.iou_type, objects, detections)
        matches = greedy_match(ious, ignored, objects.crowd)
        matched = matches >= 0
        view = np.arange(len(AREAS))[:, None, None]
        on_ignored = matched & ignored[view, matches] if len(objects) else matched
        areas = mask_area(detections.rles)
        out_of_range = ((areas < low) | (areas > high))[:, None]
        true = matched & ~on_ignored
        found = [true[..., :budget].sum(-1).T for budget in self.budgets]
        top = slice(AP_BUDGET)
        self._images[image_id] = (
            detections.scores[top],
            true[..., top],
            (on_ignored | (~matched & out_of_range))[..., top],
            (~ignored).sum(1),
            np.stack(found, -1).astype(np.int32),
        )

    def join(self, engines: Sequence['_GreedyEngine']) -> None:
        for engine in engines:
            self._images.update(engine._images)

    def compute(self) -> tuple[np.ndarray, np.ndarray]:
        """``[T, A]`` average precision at 100 detections and ``[T, A, K]`` recall."""
        scores, true, ignored, num_objects, num_found = zip(
            *(self._images[i] for i in sorted(self._images)), strict=True
        )
        scores, true, ignored = (np.concatenate(x, -1) for x in (scores, true, ignored))
        num_objects, num_found = sum(num_objects), sum(num_found)
        precision, recall = np.full(num_found.shape[:2], -1.0), np.full(num_found.shape, -1.0)
        for a in np.flatnonzero(num_objects):
            recall[:, a] = num_found[:, a] / num_objects[a]
            for t in range(len(IOU_THRESHOLDS)):
                precision[t, a] = hotcoco.metrics.average_precision(
                    scores, true[a, t], int(num_objects[a]), ignored=ignored[a, t]
                )
        return precision, recall


class _TideErrors:
    """What sorting errors takes, kept to the end: an error's cost shows in the whole ranking."""

    def __init__(self, iou_type: str) -> None:
        self.iou_type = iou_type
        self._images: dict[int, tuple[list[dict], list[dict]]] = {}

    def update(self, image_id: int, objects: Objects, detections: Detections) -> None:
        top = detections[_by_score(detections)[:AP_BUDGET]]
        self._images[image_id] = (
            _annotations(image_id, objects, self.iou_type == 'segm'),
            _results(image_id, top, self.iou_type),
        )

    def join(self, others: Sequence['_TideErrors']) -> None:
        for other in others:
            self._images.update(other._images)

    def compute(self) -> dict[str, float]:
        ids = sorted(self._images)
        truths = [annotation for i in ids for annotation in self._images[i][0]]
        gt = hotcoco.COCO(
            {
                'images': [{'id': i} for i in ids],
                'categories': [_CATEGORY],
                'annotations': [{**t, 'id': n} for n, t in enumerate(truths, start=1)],
            }
        )
        found = gt.load_res([result for i in ids for result in self._images[i][1]])
        evaluation = hotcoco.COCOeval(gt, found, self.iou_type)
        evaluation.evaluate()
        costs = evaluation.tide_errors()['delta_ap']
        return {kind: costs[kind] for kind in ('Loc', 'Dupe', 'Bkg', 'Miss', 'FP', 'FN')}


def _annotations(
    image_id: int, objects: Objects, with_masks: bool, first_id: int = 1
) -> list[dict]:
    annotations = [
        {
            'id': i,
            'image_id': image_id,
            'category_id': 1,
            'bbox': box,
            'area': area,
            'iscrowd': int(crowd),
        }
        for i, (box, area, crowd) in enumerate(
            zip(objects.boxes_xywh.tolist(), objects.areas.tolist(), objects.crowd, strict=True),
            start=first_id,
        )
    ]
    if with_masks:
        for annotation, rle in zip(annotations, objects.rles, strict=True):
            annotation['segmentation'] = rle
    return annotations


def _results(image_id: int, detections: Detections, iou_type: str = 'segm') -> list[dict]:
    key, shapes = (
        ('bbox', detections.boxes_xywh.tolist())
        if iou_type == 'bbox'
        else ('segmentation', detections.rles)
    )
    return [
        {'image_id': image_id, 'category_id': 1, key: shape, 'score': score}
        for shape, score in zip(shapes, detections.scores.tolist(), strict=True)
    ]


def format_table(metrics: Mapping[str, float]) -> str:
    """Metrics of :meth:`OpenWorldEvaluator.compute` as text, a row for each kind of overlap.

    Columns by area are shown for the largest budget only.
    """
    rows = [name.removesuffix('_AP') for name in metrics if name.endswith('_AP')]
    columns = [name.removeprefix(f'{rows[0]}_') for name in metrics if name.startswith(rows[0])]
    columns = [column for column in columns if 'TIDE' not in column]
    largest = [column for column in columns if '@' in column][-1].split('_')[0]
    columns = [column for column in columns if '_' not in column or column.startswith(largest)]
    lines = [['', *columns]]
    lines += [[row, *(f'{metrics[f"{row}_{column}"]:.3f}' for column in columns)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return '\n'.join(
        '  '.join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def evaluate_json(
    annotations: JsonFile | Mapping,
    results: JsonFile | list[dict],
    iou_types: Sequence[str] = ('bbox', 'segm'),
    max_dets: Sequence[int] = (1, 10, 100),
    base_categories: Collection[str] | None = None,
    tide: bool = False,
) -> dict[str, float]:
    """Class-agnostic metrics of a COCO result file against a COCO annotation file.

    Every image of the annotation file counts, with or without results. Categories matter for the
    order of equal scores only, which is pycocotools'.

    Args:
        annotations: COCO annotation file, or what it holds.
        results: COCO result file, or the list it holds.
        iou_types: Of ``'bbox'``, ``'segm'`` and ``'boundary'``.
        max_dets: Budgets k of AR@k.
        base_categories: Names of the categories seen in training; adds the base/novel split.
        tide: Adds TIDE's error kinds.

    Returns:
        See :meth:`OpenWorldEvaluator.compute`.

    Raises:
        FileNotFoundError, ValueError: A file is missing or not what it should be, there is no
            image, or results name images that the annotations do not have.
    """
    truth = load_coco(annotations, unchecked=('file_name', 'height', 'width'))
    found = load_results(results)
    base_ids = (
        None if base_categories is None else base_category_ids(truth['categories'], base_categories)
    )
    evaluator = OpenWorldEvaluator(iou_types, max_dets, base_ids is not None, tide)
    truth_of, found_of = by_image(truth['annotations']), by_image(found)
    ids = {image['id'] for image in truth['images']}
    strangers = [i for i in found_of if i not in ids]
    if strangers:
        raise ValueError(
            f'{len(strangers)} of the {len(found_of)} images with results are not in the '
            f'annotations ({listed(strangers, 3)}; the annotations have {listed(ids, 3)}): '
            'results and annotations belong to different data.'
        )
    with_masks = any(t != 'bbox' for t in iou_types)
    for image in truth['images']:
        objects = to_objects(truth_of[image['id']], image, with_masks, base_ids)
        evaluator.update(image['id'], objects, to_detections(found_of[image['id']], with_masks))
    return evaluator.compute()
