"""Found objects sorted by their embeddings: categories without a name (section 6.2.3).

Shapes: n objects, E of an embedding, k clusters.
"""

import json
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.cluster.vq import kmeans2

from ..common import report_page
from ..common.files import atomic_write
from ..common.overlays import colours, data_uri, draw
from ..common.pseudo_store import LABELS
from ..ops.coco_json import JsonFile, load_coco
from ..ops.images import read_image
from ..ops.rle import decode_rle, encode_masks, segmentation_to_rle
from .datasets import check_embeddings

FITTED = 20_000  # objects, drawn at random, that centres are made of
TRIES = 4  # first guesses, of which the best outcome is taken
ROWS = 65_536  # that are looked at at a time
CROPS = 12  # shown of a cluster, those nearest to its centre
CROP_PX = 160
GRID = 'grid-template-columns: repeat(auto-fill, minmax(110px, 1fr)); align-items: start'


class Clusters(NamedTuple):
    """Objects by the direction of their embeddings.

    Attributes:
        labels: ``[n]``, from 0 in the order of size; -1 for an embedding without a direction.
        cosines: ``[n]`` of each object with the centre of its cluster.
        sizes: ``[k]``.
    """

    labels: np.ndarray
    cosines: np.ndarray
    sizes: np.ndarray


def cluster(embeddings: np.ndarray, k: int, seed: int = 0) -> Clusters:
    """Spherical k-means of embeddings ``[n, E]``.

    Raises:
        ValueError: ``k`` is less than 1, or more than there are embeddings with a direction.
    """
    n = len(embeddings)
    whole = [np.isfinite(rows).all(1) & rows.any(1) for _, rows in _blocks(embeddings)]
    usable = np.flatnonzero(np.concatenate([np.zeros(0, bool), *whole]))
    if not 1 <= k <= len(usable):
        raise ValueError(
            f'{k} clusters of {len(usable)} usable embeddings: ask for at least one, and no more '
            'than there are.'
        )
    rng = np.random.default_rng(seed)
    drawn = np.sort(rng.permutation(usable)[:FITTED])
    rows = _directions(embeddings[drawn])
    best, centres = -np.inf, rows[:k]
    for _ in range(TRIES):
        found, _ = kmeans2(rows, min(k, len(rows)), iter=20, minit='++', seed=rng)
        found = _directions(found)
        if (score := (rows @ found.T).max(1).mean()) > best:
            best, centres = score, found
    labels, cosines = np.full(n, -1), np.zeros(n, np.float32)
    for start, rows in _blocks(embeddings):
        products = _directions(rows) @ centres.T
        labels[start : start + len(rows)] = products.argmax(1)
        cosines[start : start + len(rows)] = products.max(1)
    unusable = np.setdiff1d(np.arange(n), usable)
    labels[unusable], cosines[unusable] = -1, 0
    sizes = np.bincount(labels[usable], minlength=k)
    order = np.argsort(-sizes, kind='stable')
    labels[usable] = np.argsort(order)[labels[usable]]
    return Clusters(labels, cosines, sizes[order])


def _blocks(embeddings: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(embeddings), ROWS):
        yield start, np.asarray(embeddings[start : start + ROWS], np.float32)


def _directions(rows: np.ndarray) -> np.ndarray:
    rows = np.asarray(rows, np.float32)
    with np.errstate(invalid='ignore'):
        return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(min=1e-12)


def write_clusters(
    source: JsonFile,
    image_root: JsonFile,
    out_html: JsonFile,
    k: int = 20,
    out_json: JsonFile | None = None,
    seed: int = 0,
) -> Clusters:
    """Cluster the objects of pseudo-labels, and write a page of their pictures.

    Args:
        source: A finished store, or a pseudo-label file with its embeddings beside it.
        image_root: Folder that file names are relative to; missing images are grey and named.
        out_html: The page, self-contained. Written atomically.
        k: Number of clusters.
        out_json: Where to write the labels with a category for each cluster, if anywhere. Objects
            of no cluster are left out.
        seed: Of the first guesses.

    Raises:
        FileNotFoundError, ValueError: A file is missing or not what it should be.
    """
    path = Path(source)
    path = path / LABELS if path.is_dir() else path
    data = load_coco(path)
    annotations = data['annotations']
    embeddings = check_embeddings(str(path), [annotation['id'] for annotation in annotations])
    clusters = cluster(embeddings, k, seed)
    angles = np.degrees(np.arccos(clusters.cosines.clip(-1, 1)))
    images = {image['id']: image for image in data['images']}
    notices: dict[str, None] = {}
    body = ''
    for number, (size, colour) in enumerate(zip(clusters.sizes, colours(k), strict=True)):
        members = np.flatnonzero(clusters.labels == number)
        nearest = members[np.argsort(-clusters.cosines[members], kind='stable')][:CROPS]
        crops = ''
        for i in nearest:
            entry = images[annotations[i]['image_id']]
            picture = _crop(entry, annotations[i], Path(image_root), colour, notices)
            name = escape(Path(entry['file_name']).name)
            crops += (
                f'<button type="button"><img alt="{name}" src="{data_uri(picture)}">'
                f'<span>{angles[i]:.1f}°</span></button>'
            )
        mean = angles[members].mean() if size else 0
        body += (
            f'<h3>{number + 1}</h3><p>{report_page.counted(int(size), "object")} · mean angle '
            f'{mean:.1f}°</p><div class="views" style="{GRID}">{crops}</div>'
        )
    lost = int((clusters.labels < 0).sum())
    body = f"""
<header><h1>Found objects, by their embeddings</h1>
<p class="lede">{report_page.counted(len(annotations), 'object')} of
{report_page.counted(len(images), 'image')} in {report_page.counted(k, 'cluster')}{
        f'; {lost:,} without an embedding' if lost else ''
    }. Shown are those nearest to the centre,
with their angle to it.</p></header>
<section>{report_page.trouble(list(notices))}{body}</section>
"""
    with atomic_write(out_html) as file:
        file.write(report_page.page('Found objects, by their embeddings', body))
    if out_json is not None:
        _write_labels(data, clusters, out_json)
    return clusters


def _write_labels(data: Mapping, clusters: Clusters, path: JsonFile) -> None:
    annotations = [
        annotation | dict(category_id=int(label) + 1)
        for annotation, label in zip(data['annotations'], clusters.labels, strict=True)
        if label >= 0
    ]
    categories = [dict(id=i + 1, name=f'cluster {i + 1}') for i in range(len(clusters.sizes))]
    with atomic_write(path) as file:
        json.dump(dict(data) | dict(annotations=annotations, categories=categories), file)


def _crop(
    entry: Mapping,
    annotation: Mapping,
    image_root: Path,
    colour: tuple[int, int, int],
    notices: dict[str, None],
) -> np.ndarray:
    """The object in a square of 1.4 times its longer side, as far as the image reaches."""
    size = entry['height'], entry['width']
    try:
        image = read_image(image_root / entry['file_name'], size)
    except (OSError, ValueError) as error:
        notices[str(error).removeprefix(f'{image_root}/')] = None
        image = np.full((*size, 3), 120, np.uint8)
    x, y, width, height = annotation['bbox']
    half = 0.7 * max(width, height, 2)
    left, top = (max(0, int(centre - half)) for centre in (x + width / 2, y + height / 2))
    right, bottom = (int(centre + half) + 1 for centre in (x + width / 2, y + height / 2))
    window = np.s_[top:bottom, left:right]
    (mask,) = decode_rle([segmentation_to_rle(annotation['segmentation'], size)])
    rles = encode_masks(np.ascontiguousarray(mask[window])[None])
    return draw(np.ascontiguousarray(image[window]), rles, [colour], CROP_PX)
