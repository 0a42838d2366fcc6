"""One page on what a stage found: how many masks, how large, how sure, and what each rule dropped.

It needs no labels. :mod:`mmdet_plugins.common.report` is the page for where there are some.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import numpy as np
from hotcoco import mask as coco_mask

from ..common import report_page
from ..common.files import atomic_write
from ..common.overlays import colours, data_uri, draw
from ..common.pseudo_store import LABELS
from ..ops.coco_json import (
    JsonFile,
    by_image,
    check_coco,
    check_entries,
    listed,
    load_coco,
    load_results,
    read_json,
)
from ..ops.images import read_image
from ..ops.rle import area, segmentation_to_rle

TITLE = 'Found without labels'
COUNT_EDGES = (0, 1, 2, 3, 5, 9, 17)
SIDE_EDGES_PX = (0, 8, 16, 32, 64, 128, 256)
COVERAGE_EDGES = (0, 1, 10, 25, 50, 75, 90)  # percent
RULES = {
    'cells': 'too few cells',
    'score': 'not certain enough',
    'number': 'beyond the most an image may have',
    'centre': 'centre too high',
    'width': 'too wide',
    'certainty': 'prediction below the threshold',
}
CAPTIONS = {
    'Masks an image': '<b>Masks an image.</b> Share of the images; below it, their number.',
    'Side of a mask': '<b>Side of a mask.</b> Square root of its area in pixels; share of the '
    'masks, and their number.',
    'Coverage': '<b>Coverage.</b> Per cent of an image that lies in any mask; share of the images.',
}


@dataclass(frozen=True)
class ImageHealth:
    """What was found in one image.

    Attributes:
        entry: Its COCO entry.
        rles: n masks.
        areas: ``[n]``, px.
        scores: ``[n]``, NaN for a mask without one.
        coverage: Part of the image that lies in any mask.
        dropped: How many masks each rule took.
    """

    entry: Mapping
    rles: Sequence[dict]
    areas: np.ndarray
    scores: np.ndarray
    coverage: float
    dropped: Mapping[str, int]

    @property
    def certainty(self) -> float:
        """The mean score, NaN without masks."""
        return float(self.scores.mean()) if len(self.scores) else float('nan')


@dataclass
class StageHealth:
    """What was found in all images of a stage.

    Attributes:
        images: Those that could be read.
        unreadable: Name of each of the others, and why.
    """

    images: list[ImageHealth]
    unreadable: dict[str, str] = field(default_factory=dict)

    @property
    def dropped(self) -> Counter:
        """How many masks each rule took in all images."""
        total: Counter = Counter()
        for image in self.images:
            total.update(image.dropped)
        return total

    def figures(self) -> dict[str, str]:
        """The rows of the table, in words."""
        counts = np.array([len(image.rles) for image in self.images], int)
        sides = self.sides_px()
        scores = np.concatenate([np.zeros(0), *(image.scores for image in self.images)])
        covered = np.array([image.coverage for image in self.images])
        rows = {
            'images': f'{len(counts):,}',
            'unreadable images': f'{len(self.unreadable):,}',
            'images without masks': f'{np.count_nonzero(counts == 0):,}',
            'masks': f'{counts.sum():,}',
            'masks an image': _mean(counts, '.2f'),
            'median side, px': f'{np.median(sides):.0f}' if len(sides) else '–',
            'mean score': _mean(scores, '.3f'),
            'mean coverage': _mean(covered, '.1%'),
        }
        return rows | {
            f'dropped: {RULES.get(rule, rule)}': f'{count:,}'
            for rule, count in self.dropped.items()
        }

    def sides_px(self) -> np.ndarray:
        """Square roots of the areas of all masks."""
        return np.sqrt(np.concatenate([np.zeros(0), *(image.areas for image in self.images)]))

    def histograms(self) -> dict[str, list[tuple[str, int, float]]]:
        """``(bin, number, share)`` by what they count."""
        counts = np.array([len(image.rles) for image in self.images], int)
        covered = 100 * np.array([image.coverage for image in self.images])
        return {
            'Masks an image': histogram(counts, COUNT_EDGES, whole=True),
            'Side of a mask': histogram(self.sides_px(), SIDE_EDGES_PX),
            'Coverage': histogram(covered, COVERAGE_EDGES),
        }


def read_stage(source: JsonFile, listing: JsonFile | None = None) -> StageHealth:
    """Read what a stage found.

    Args:
        source: A finished store; a COCO file; or COCO results, a list.
        listing: For results, the COCO file that names their images.

    Raises:
        FileNotFoundError, ValueError: It is none of these, or not finished.
    """
    source, manifest = Path(source), []
    if source.is_dir():
        manifest = read_json(source / 'manifest.json').get('images', [])
        if not (source / LABELS).exists():
            raise ValueError(f'{source}: the store is not finished: start its run again.')
        source = source / LABELS
    data = read_json(source)
    if isinstance(data, list):
        if listing is None:
            raise ValueError(
                f'{source}: these are COCO results, which do not say the names and sizes of their '
                'images: give the COCO file that does.'
            )
        data, results = load_coco(listing), load_results(data)
        data['annotations'] = results
        known = {image['id'] for image in data['images']}
        if strangers := {found.get('image_id') for found in results} - known:
            raise ValueError(
                f'{source}: {listing} does not list the images {listed(sorted(strangers), 3)}.'
            )
    else:
        data = check_entries(check_coco(data, str(source)), str(source))
    dropped = {image['id']: image.get('dropped', {}) for image in manifest}
    annotations = by_image(data['annotations'])
    return StageHealth(
        [
            _measure(image, annotations[image['id']], dropped.get(image['id'], {}))
            for image in data['images']
        ],
        {image['file_name']: image['unreadable'] for image in manifest if 'unreadable' in image},
    )


def _measure(entry: Mapping, annotations: Sequence[Mapping], dropped: Mapping) -> ImageHealth:
    size = entry['height'], entry['width']
    try:
        rles = [segmentation_to_rle(found.get('segmentation'), size) for found in annotations]
    except ValueError as error:
        raise ValueError(f'{entry["file_name"]}: one of its masks is none: {error}.') from None
    covered = int(area([coco_mask.merge(rles)])[0]) if rles else 0
    scores = np.array([found.get('score', np.nan) for found in annotations], float)
    return ImageHealth(entry, rles, area(rles), scores, covered / (size[0] * size[1]), dropped)


def histogram(
    values: np.ndarray, edges: Sequence[int], whole: bool = False
) -> list[tuple[str, int, float]]:
    """``(label, number, share)`` of the values in ``[low, high)``; the last bin has no end."""
    bins = []
    for low, high in zip(edges, [*edges[1:], None], strict=True):
        inside = (values >= low) & (values < (np.inf if high is None else high))
        last = f'–{high - 1}' if whole and high and high > low + 1 else ''
        label = f'{low}{last}' if whole else f'{low}–{high}'
        label = f'≥ {low}' if high is None else label
        bins.append((label, int(inside.sum()), float(inside.mean()) if len(values) else 0.0))
    return bins


def choose(stage: StageHealth, count: int) -> dict[str, list[ImageHealth]]:
    """Images to show, ``count`` of each kind at most; none is of two kinds."""
    rated = [image for image in stage.images if not np.isnan(image.certainty)]
    rated.sort(key=lambda image: (-image.certainty, image.entry['id']))
    half = min(count, (len(rated) + 1) // 2)
    groups = {'Best': rated[:half], 'Worst': rated[half:][::-1][:count]}
    shown = {image.entry['id'] for group in groups.values() for image in group}
    rest = [image for image in stage.images if image.entry['id'] not in shown]
    rest.sort(key=lambda image: -sum(image.dropped.values()))
    groups['Most dropped'] = [image for image in rest if sum(image.dropped.values())][:count]
    return {name: group for name, group in groups.items() if group}


def write_health(
    stages: Mapping[str, JsonFile],
    image_root: JsonFile,
    out_html: JsonFile,
    listing: JsonFile | None = None,
    num_images: int = 4,
) -> Path:
    """Write the page.

    Args:
        stages: What each stage found, by its name: see :func:`read_stage`. The images of the first
            are shown; the others stand beside it in the table and the plots.
        image_root: Folder that file names are relative to. An image that is missing there is shown
            as a grey frame and named.
        out_html: The page, self-contained. Written atomically.
        listing: As for :func:`read_stage`.
        num_images: Images of each kind: the most certain, the least certain, and those in which
            most was dropped.

    Returns:
        ``out_html``.

    Raises:
        FileNotFoundError, ValueError: A file is missing or not what it should be.
    """
    if not stages:
        raise ValueError('There is nothing to report on: give at least one stage.')
    found = {name: read_stage(source, listing) for name, source in stages.items()}
    first = next(iter(found.values()))
    notices = [f'{name}: {why}' for name, why in first.unreadable.items()]
    plots = ''
    histograms = {name: stage.histograms() for name, stage in found.items()}
    for label in next(iter(histograms.values())):
        bins = {name: of_stage[label] for name, of_stage in histograms.items()}
        plot = report_page.bar_plot(label, bins, report_page.axis_top({}, bins))
        plots += f'<figure>{plot}<figcaption>{CAPTIONS[label]}</figcaption></figure>'
    cards = ''
    for kind, images in choose(first, num_images).items():
        figures = ''.join(_card(image, Path(image_root), notices) for image in images)
        cards += f'<h3>{kind}</h3><div class="cards">{figures}</div>'
    body = f"""
<header><h1>{TITLE}</h1>
<p class="lede">Masks of <b>{escape(next(iter(found)))}</b>, and what was left out of them. No label
was looked at.</p></header>
<section><h2>Figures</h2>{_table({name: stage.figures() for name, stage in found.items()})}
</section>
<section><h2>How many, how large</h2>{report_page.legend(found)}<div class="plots">{plots}</div>
</section>
<section><h2>Images</h2>
<p>By the mean score of their masks: the highest, the lowest; then those in which most masks were
dropped.</p>
{report_page.trouble(notices)}{cards}</section>
"""
    with atomic_write(out_html) as file:
        file.write(report_page.page(TITLE, body))
    return Path(out_html)


def _table(columns: Mapping[str, Mapping[str, str]]) -> str:
    rows: Iterable[str] = dict.fromkeys(row for cells in columns.values() for row in cells)
    head = ''.join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = ''.join(
        f'<tr><th scope="row">{escape(row)}</th>'
        + ''.join(f'<td>{cells.get(row, "–")}</td>' for cells in columns.values())
        + '</tr>'
        for row in rows
    )
    return (
        f'<div class="wide"><table><thead><tr><th></th>{head}</tr></thead>'
        f'<tbody>{body}</tbody></table></div>'
    )


def _card(image: ImageHealth, image_root: Path, notices: list[str]) -> str:
    size = image.entry['height'], image.entry['width']
    name = image.entry['file_name']
    try:
        pixels = read_image(image_root / name, size)
    except (OSError, ValueError) as error:
        notices.append(str(error).removeprefix(f'{image_root}/'))
        pixels = np.full((*size, 3), 120, np.uint8)
    picture = data_uri(draw(pixels, image.rles, colours(len(image.rles))))
    facts = [report_page.counted(len(image.rles), 'mask'), f'{image.coverage:.0%} covered']
    if len(image.rles):
        facts.append(f'score {report_page.number(image.certainty)}')
    facts += [f'{n:,} {RULES.get(rule, rule)}' for rule, n in image.dropped.items() if n]
    return (
        f'<figure class="card"><div class="views"><button type="button">'
        f'<img alt="{escape(name)}" src="{picture}"></button></div>'
        f'<figcaption><b>{escape(Path(name).name)}</b> · {" · ".join(facts)}</figcaption></figure>'
    )


def _mean(values: np.ndarray, form: str) -> str:
    values = values[~np.isnan(values)]
    return format(float(values.mean()), form) if len(values) else '–'
