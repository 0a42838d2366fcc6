"""One self-contained HTML page on how well a set of results finds and outlines every object.

It needs no package of the mm family. Shapes: G counted objects (crowds left out) and D detections
of one image, T = 10 IoU thresholds (0.50:0.05:0.95).
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from hotcoco import mask as coco_mask

from mmdet_plugins.common import report_page
from mmdet_plugins.common.files import atomic_write
from mmdet_plugins.common.overlays import (
    colours,
    data_uri,
    draw,
    picture_scale,
    resize,
)
from mmdet_plugins.ops.coco_json import (
    Detections,
    JsonFile,
    Objects,
    by_image,
    load_coco,
    load_results,
    to_detections,
    to_objects,
)
from mmdet_plugins.ops.images import read_image
from mmdet_plugins.ops.open_world import evaluate_json, greedy_match, pairwise_iou

MOST_DETECTIONS = 1000
BUDGET = 100  # detections an image of the per-image recall, the size bins and the pictures
BIN_EDGES_PX = (0, 8, 16, 32, 64, 128, 256, 512, np.inf)
NEVER = np.iinfo(np.int32).max


@dataclass(frozen=True)
class ImageMatch:
    """What the detections of one image found.

    Attributes:
        ranks: ``[T, G]`` place (from 0) in the order of scores of the detection that matched the
            object, ``NEVER`` if none did.
        partners: ``[D]`` object matched by each detection at IoU 0.5, in the order of scores, or
            -1; indices run over all annotations of the image, crowds included.
        order: ``[D]`` indices of the detections, best score first.
    """

    ranks: np.ndarray
    partners: np.ndarray
    order: np.ndarray

    @property
    def recall(self) -> float:
        """AR@100 of this image; NaN without objects."""
        return float((self.ranks < BUDGET).mean()) if self.ranks.size else float('nan')


def match_image(objects: Objects, detections: Detections) -> ImageMatch:
    """Match by masks where both sides have them, by boxes otherwise.

    COCO's greedy matching goes down the scores, so that its outcome for a budget of k detections
    is that of the first k in the matching of all: one pass serves every k.
    """
    order = np.argsort(-detections.scores, kind='stable')[:MOST_DETECTIONS]
    found = detections[order]
    boxes_only = objects.rles is None or found.rles is None
    ious = pairwise_iou('bbox' if boxes_only else 'segm', objects, found)
    matches = greedy_match(ious, objects.crowd[None], objects.crowd)[0]
    ranks = np.full((len(matches), len(objects)), NEVER, np.int32)
    threshold, detection = np.nonzero(matches >= 0)
    ranks[threshold, matches[threshold, detection]] = detection
    return ImageMatch(ranks[:, ~objects.crowd], matches[0], order)


def recall_curve(ranks: np.ndarray, budgets: Sequence[int]) -> list[float]:
    """AR@k for each k of ``budgets`` from the ranks of all objects, ``[T, G]``."""
    places = np.sort(ranks, axis=None)
    return (np.searchsorted(places, budgets) / max(places.size, 1)).tolist()


def size_bins(ranks: np.ndarray, sides_px: np.ndarray) -> list[tuple[str, int, float]]:
    """AR@100 by object size.

    Args:
        ranks: ``[T, G]``.
        sides_px: ``[G]`` square roots of the areas.

    Returns:
        ``(label, number of objects, recall)`` of each bin of ``BIN_EDGES_PX`` that has objects.
    """
    bins = []
    for low, high in zip(BIN_EDGES_PX[:-1], BIN_EDGES_PX[1:], strict=True):
        inside = (sides_px >= low) & (sides_px < high)
        if inside.any():
            label = f'≥ {low}' if high == np.inf else f'< {high}' if low == 0 else f'{low}–{high}'
            bins.append((label, int(inside.sum()), float((ranks[:, inside] < BUDGET).mean())))
    return bins


class _Evaluated:
    """Annotations, results and their matches, read once and looked at by several parts."""

    def __init__(
        self, annotations: JsonFile | Mapping, results: Mapping[str, JsonFile | list]
    ) -> None:
        if not results:
            raise ValueError('There is nothing to report on: give at least one set of results.')
        self.truth = load_coco(annotations)
        self.results = {name: load_results(source) for name, source in results.items()}
        self.images = {image['id']: image for image in self.truth['images']}
        self.masks = all('segmentation' in r for found in self.results.values() for r in found)
        annotations_of = by_image(self.truth['annotations'])
        self.objects = {
            key: to_objects(annotations_of[key], image, self.masks)
            for key, image in self.images.items()
        }
        self.detections: dict[str, dict[int, Detections]] = {}
        self.matches: dict[str, dict[int, ImageMatch]] = {}
        for name, found in self.results.items():
            results_of = by_image(found)
            self.detections[name] = {
                key: to_detections(results_of[key], self.masks) for key in self.images
            }
            self.matches[name] = {
                key: match_image(self.objects[key], self.detections[name][key])
                for key in self.images
            }

    def ranks(self, name: str) -> np.ndarray:
        """``[T, G]`` over the objects of all images."""
        return np.concatenate(
            [np.zeros((10, 0), np.int32)] + [match.ranks for match in self.matches[name].values()],
            axis=1,
        )

    def sides_px(self) -> np.ndarray:
        areas = [objects.areas[~objects.crowd] for objects in self.objects.values()]
        return np.sqrt(np.concatenate([np.zeros(0), *areas]))


def choose_images(
    recalls: Mapping[int, float], weights: Mapping[int, int], count: int, seed: int = 0
) -> dict[str, list[int]]:
    """Image ids to show: of the best and the worst recall, and at random from the rest.

    Args:
        recalls: Recall of each image; NaN where there is no object, which can only be drawn.
        weights: Number of objects of each image; among equal recalls the fuller image goes first.
        count: Images a group.
        seed: Of the random group.
    """
    rated = [key for key, recall in recalls.items() if not np.isnan(recall)]
    best = sorted(rated, key=lambda key: (-recalls[key], -weights[key], key))
    worst = sorted(rated, key=lambda key: (recalls[key], -weights[key], key))
    chosen = {'Best': best[: min(count, len(rated) // 2)]}
    chosen['Worst'] = [key for key in worst if key not in chosen['Best']][:count]
    rest = sorted(key for key in recalls if key not in chosen['Best'] + chosen['Worst'])
    chosen['Random'] = random.Random(seed).sample(rest, min(count, len(rest)))
    return {group: keys for group, keys in chosen.items() if keys}


def paint(
    data: _Evaluated, name: str, key: int, image: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Photo, annotations and predictions of one image as three pictures of one size.

    Of the predictions it shows those among the best 100 that match an object at IoU 0.5, and as
    many of the best-scored others as would be shown if there were one prediction an object.
    """
    objects, match = data.objects[key], data.matches[name][key]
    detections = data.detections[name][key]
    palette = colours(len(objects))
    partners = match.partners[:BUDGET]
    found = set(partners[partners >= 0].tolist())
    truths = [i for i in range(len(objects)) if not objects.crowd[i]]
    shown = [d for d, partner in enumerate(partners) if partner >= 0 or d < max(len(truths), 1)]
    truth = draw(
        image,
        _shapes(objects, image, truths),
        [palette[i] if i in found else None for i in truths],
    )
    fills = [palette[partners[d]] if partners[d] >= 0 else None for d in shown]
    prediction = draw(image, _shapes(detections, image, match.order[shown]), fills)
    return resize(image, picture_scale(image.shape[:2])), truth, prediction


def _shapes(side: Objects | Detections, image: np.ndarray, index: Sequence[int]) -> list[dict]:
    """Masks of some instances as RLEs; their boxes where there are no masks."""
    if side.rles is not None:
        return [side.rles[i] for i in index]
    height, width = image.shape[:2]
    return [coco_mask.fr_bbox(side.boxes_xywh[i].tolist(), height, width) for i in index]


def _load(data: _Evaluated, image_root: Path, key: int) -> tuple[np.ndarray, str | None]:
    """The image, or a grey frame and what is wrong with its file."""
    entry = data.images[key]
    size = (entry['height'], entry['width'])
    try:
        return read_image(image_root / entry['file_name'], size), None
    except (OSError, ValueError) as error:
        return np.full((*size, 3), 120, np.uint8), str(error).removeprefix(f'{image_root}/')


def write_report(
    gt_json: JsonFile | Mapping,
    image_root: str | Path,
    results: Mapping[str, JsonFile | list],
    out_html: str | Path,
    metrics: Mapping[str, Mapping[str, float]] | None = None,
    title: str = 'Open-world segmentation',
    num_images: int = 4,
    seed: int = 0,
) -> Path:
    """Write the page.

    Args:
        gt_json: COCO annotations. The category is not looked at.
        image_root: Folder that the annotations' ``file_name`` is relative to. An image that is
            missing there is named on the page and shown as a grey frame.
        results: COCO results by name. The first is the one whose images are shown; the others are
            set beside it in the table and the plots.
        out_html: The page. Written atomically.
        metrics: What to print, by name of the results, as of
            :func:`~mmdet_plugins.ops.open_world.evaluate_json`, which is asked for those that are
            not given. Other names make further columns.
        title: Heading.
        num_images: Images in each of the groups best, worst and random.
        seed: Of the random group.

    Returns:
        ``out_html``.

    Raises:
        FileNotFoundError, ValueError: A JSON file is missing or not what it should be.
    """
    data = _Evaluated(gt_json, results)
    first = next(iter(results))
    iou_types = ('segm', 'bbox') if data.masks else ('bbox',)
    given = dict(metrics or {})
    table = {
        name: given.pop(name, None) or evaluate_json(data.truth, found, iou_types)
        for name, found in data.results.items()
    }
    budgets = np.unique(np.geomspace(1, MOST_DETECTIONS, 73).round().astype(int))
    sides_px = data.sides_px()
    curves, bins = {}, {}
    for name in results:
        ranks = data.ranks(name)
        curves[name] = list(zip(budgets.tolist(), recall_curve(ranks, budgets), strict=True))
        bins[name] = size_bins(ranks, sides_px)

    weights = {key: int((~objects.crowd).sum()) for key, objects in data.objects.items()}
    recalls = {key: match.recall for key, match in data.matches[first].items()}
    notices, groups = [], {}
    for group, keys in choose_images(recalls, weights, num_images, seed).items():
        groups[group] = []
        for key in keys:
            image, problem = _load(data, Path(image_root), key)
            if problem:
                notices.append(problem)
            photo, truth, prediction = map(data_uri, paint(data, first, key, image))
            groups[group].append(
                report_page.Card(
                    file_name=Path(data.images[key]['file_name']).name,
                    num_objects=weights[key],
                    num_found=int((data.matches[first][key].ranks[0] < BUDGET).sum()),
                    num_predictions=len(data.detections[first][key]),
                    recall=recalls[key],
                    photo=photo,
                    truth=truth,
                    prediction=prediction,
                    problem=problem,
                )
            )
    page = report_page.render(
        title=title,
        num_images=len(data.images),
        num_objects=sum(weights.values()),
        metrics=table | given,
        curves=curves,
        bins=bins,
        groups=groups,
        notices=notices,
        by_masks=data.masks,
    )
    with atomic_write(out_html) as file:
        file.write(page)
    return Path(out_html)


def write_strip(
    gt_json: JsonFile | Mapping,
    image_root: str | Path,
    results: JsonFile | list,
    out_png: str | Path,
    image_ids: Sequence[int],
    width_px: int = 1440,
) -> Path:
    """Write one picture for a page: a row an image, with input, ground truth and ours side by side.

    Args:
        gt_json: COCO annotations.
        image_root: Folder that the annotations' ``file_name`` is relative to.
        results: COCO results.
        out_png: The picture, PNG or JPEG by its suffix. Written atomically.
        image_ids: Images to show, from top to bottom.
        width_px: Width of the picture; each image takes a third of it, less the gaps.

    Raises:
        ValueError: An id is not in the annotations, or its file cannot be read.
    """
    gap = 12
    data = _Evaluated(gt_json, {'ours': results})
    if unknown := [key for key in image_ids if key not in data.images]:
        raise ValueError(f'The annotations have no image {unknown[0]}.')
    side = (width_px - 2 * gap) // 3
    rows = []
    for key in image_ids:
        image, problem = _load(data, Path(image_root), key)
        if problem:
            raise ValueError(f'{image_root}: {problem}.')
        tiles = [
            cv2.resize(
                tile,
                (side, round(side * tile.shape[0] / tile.shape[1])),
                interpolation=cv2.INTER_AREA,
            )
            for tile in paint(data, 'ours', key, image)
        ]
        space = np.full((len(tiles[0]), gap, 3), 255, np.uint8)
        row = np.hstack([tiles[0], space, tiles[1], space, tiles[2]])
        rows += [row, np.full((gap, row.shape[1], 3), 255, np.uint8)]
    picture = np.vstack(rows[:-1])
    with atomic_write(out_png, 'wb') as file:
        file.write(cv2.imencode(Path(out_png).suffix, picture)[1].tobytes())
    return Path(out_png)
