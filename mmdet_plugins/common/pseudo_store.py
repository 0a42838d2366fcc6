"""Pseudo-labels on disk: a store that many processes fill, and that outlives every kill.

A store is a folder. ``manifest.json`` lists the images and the configuration, and is written before
anything else; the plan of batches follows from it alone, so it is the same for any number of ranks
and after any interruption. ``shards/*.jsonl`` grow by one record an image and one line that commits
a batch; ``shards/*.f16`` hold the embeddings. What is not committed does not count: its batch is
done again, whole. Once every batch is there, ``pseudo_labels.json`` (COCO, ordered by image) and
``pseudo_labels.embeddings.npy`` (float16, a row for each annotation, in their order) are written,
and the manifest gets a status for each image, and what each rule dropped there.
"""

import fcntl
import hashlib
import json
import os
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import numpy as np
from mmengine.fileio import get_local_path
from PIL import Image, UnidentifiedImageError

from ..ops.coco_json import read_json
from ..ops.rle import RLE
from .files import atomic_write

LABELS, EMBEDDINGS = 'pseudo_labels.json', 'pseudo_labels.embeddings.npy'
CATEGORIES = [dict(id=1, name='object', supercategory='object')]
PATIENCE_S = 12.0  # that another run gets to let go of a store
SUFFIXES = {'.bmp', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp'}


class StoreError(RuntimeError):
    """A store that is in use, damaged, or of something else; the message says how to go on."""


class PseudoLabels(NamedTuple):
    """The objects found in one image.

    Attributes:
        rles: n COCO encodings.
        boxes_xyxy: ``[n, 4]``.
        areas: ``[n]`` pixels.
        scores: ``[n]``.
        embeddings: ``[n, E]``; E may be 0.
        unreadable: Why the image could not be read, if so.
        dropped: How many candidates each rule took, by its name.
    """

    rles: Sequence[RLE]
    boxes_xyxy: np.ndarray
    areas: np.ndarray
    scores: np.ndarray
    embeddings: np.ndarray
    unreadable: str | None = None
    dropped: Mapping[str, int] = {}


def list_images(folder: str | os.PathLike) -> list[Path]:
    """Image files of a folder and of those in it, by their suffix, sorted; hidden ones are not.

    Raises:
        FileNotFoundError, ValueError: There is no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f'{folder}: there is no such folder of images.')
    files = {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob('*')
        if path.suffix.lower() in SUFFIXES and path.is_file()
    }
    files = {name: path for name, path in files.items() if not f'/{name}'.count('/.')}
    if not files:
        raise ValueError(
            f'{folder}: there is no image in this folder (nothing that ends in '
            f'{", ".join(sorted(SUFFIXES))}).'
        )
    return [files[name] for name in sorted(files)]


def read_image_list(source: str | os.PathLike, backend_args: dict | None = None) -> list[dict]:
    """COCO image entries (``id file_name height width``) of a folder or of a COCO file.

    The images of a folder are numbered from 1 in the order of :func:`list_images`; their sizes are
    those after the turn that their EXIF data asks for. An image whose header cannot be read has a
    size of 0 x 0 and says why in ``unreadable``.

    Raises:
        FileNotFoundError, ValueError: There are none, or they are not COCO's, or two share an id.
    """
    if Path(source).is_dir() or not str(source).endswith('.json'):
        return [_entry(i + 1, path, source) for i, path in enumerate(list_images(source))]
    with get_local_path(source, backend_args=backend_args) as path:
        data = read_json(path)
    images = data.get('images') if isinstance(data, Mapping) else None
    if not isinstance(images, list) or not images:
        raise ValueError(f'{source}: this COCO file lists no images.')
    fields = ('id', 'file_name', 'height', 'width')
    seen = set()
    for image in images:
        if lacking := [field for field in fields if field not in image]:
            raise ValueError(f'{source}: an image lacks {", ".join(lacking)}: {image}.')
        if image['id'] in seen:
            raise ValueError(f'{source}: two images have the id {image["id"]}: renumber them.')
        seen.add(image['id'])
    return [{field: image[field] for field in fields} for image in images]


def find_copies(paths: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Pairs of a file and an earlier one of the same size and the same last 64 KiB.

    What cannot be opened is no copy.
    """
    by_size = defaultdict(list)
    for path in dict.fromkeys(paths):
        by_size[path.stat().st_size].append(path)
    copies = []
    for size, members in by_size.items():
        first: dict[bytes, Path] = {}
        for path in members if len(members) > 1 else ():
            try:
                with open(path, 'rb') as file:
                    file.seek(max(0, size - (64 << 10)))
                    original = first.setdefault(hashlib.sha256(file.read()).digest(), path)
            except OSError:
                continue
            if original is not path:
                copies.append((path, original))
    return copies


def digest_images(paths: Sequence[Path], count: int = 64) -> str:
    """A hash of what is in so many files, spread evenly over the list; those missing count too."""
    digest = hashlib.sha256()
    for i in sorted({i * len(paths) // count for i in range(count)}) if paths else ():
        try:
            digest.update(hashlib.sha256(paths[i].read_bytes()).digest())
        except OSError:
            digest.update(b'missing')
    return digest.hexdigest()[:16]


def _entry(number: int, path: Path, folder: str | os.PathLike) -> dict:
    entry = dict(id=number, file_name=path.relative_to(folder).as_posix(), height=0, width=0)
    try:
        with Image.open(path) as image:
            width, height = image.size
            # The orientations that swap the sides; Pillow has turned a TIFF already.
            if image.format != 'TIFF' and image.getexif().get(0x0112) in (5, 6, 7, 8):
                width, height = height, width
    except Exception as error:  # Pillow raises all kinds of them over a broken header
        what = 'not an image' if isinstance(error, UnidentifiedImageError) else error
        return entry | dict(unreadable=f'its header cannot be read: {what}'.replace(str(path), ''))
    return entry | dict(height=height, width=width)


def plan_batches(images: Sequence[Mapping], batch_size: int) -> list[list[int]]:
    """Positions of images, batched by size in their order; unreadable ones are left out."""
    batches, open_batches = [], {}
    for position, image in enumerate(images):
        if 'unreadable' in image:
            continue
        size = image['height'], image['width']
        if len(open_batches.get(size, ())) in (0, batch_size):
            open_batches[size] = []
            batches.append(open_batches[size])
        open_batches[size].append(position)
    return batches


@dataclass
class _Committed:
    """Where the records of a batch stand: a shard, and a line for each image."""

    shard: Path
    spans: list[tuple[int, int]]
    rows: int
    columns: int


class PseudoStore:
    """One process's view of a store.

    Args:
        folder: Made if it is missing.
        images: The COCO entries of all images.
        config: Whatever decides the labels, as JSON takes it; a store holds labels of one.
        batch_size: Of the plan.
        rank: The first process makes and locks the store; the others come after it has done so.

    Raises:
        StoreError: Another run is on the store; it was begun with other images or another
            configuration; one of its files was changed by someone else.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        images: Sequence[Mapping],
        config: Mapping[str, Any],
        batch_size: int,
        rank: int = 0,
    ) -> None:
        self.folder = Path(folder)
        self.images = images
        self.batches = plan_batches(images, batch_size)
        self.rank = rank
        self._batch_of = {positions[0]: b for b, positions in enumerate(self.batches)}
        self._files: list[BinaryIO] = []
        self._locks: list[BinaryIO] = []
        self._manifest = dict(
            config=json.loads(json.dumps(config)), batch_size=batch_size, images=list(images)
        )
        self._manifest['hash'] = fingerprint(self._manifest['config'])
        if rank == 0:
            self._claim()

    def pending(self) -> list[list[int]]:
        """The batches that are not committed yet."""
        done = self._scan()
        return [positions for b, positions in enumerate(self.batches) if b not in done]

    def add(self, positions: Sequence[int], labels: Sequence[PseudoLabels]) -> None:
        """Commit one batch of the plan.

        Raises:
            StoreError: It is none, or cannot be written.
        """
        batch = self._batch_of.get(positions[0])
        if batch is None or self.batches[batch] != list(positions):
            raise StoreError(
                f'{self.folder}: the images {list(positions)[:4]} are no batch of its plan; let '
                "the store's own sampler form the batches."
            )
        with self._room_needed():
            lines, vectors = self._files or self._new_shard()
            offset, records, crc, rows, columns = vectors.tell(), [], 0, 0, 0
            for position, found in zip(positions, labels, strict=True):
                block = np.ascontiguousarray(found.embeddings, dtype='<f2')
                record = _record(position, found, offset, block)
                records.append((json.dumps(record, separators=(',', ':')) + '\n').encode())
                crc = zlib.crc32(records[-1], crc)
                offset += vectors.write(block.tobytes())
                rows, columns = rows + len(block), max(columns, block.shape[1])
            _flush(vectors)
            commit = dict(batch=batch, crc=crc, rows=rows, columns=columns)
            lines.write(b''.join(records) + json.dumps(commit).encode() + b'\n')
            _flush(lines)

    def finish(self) -> dict[str, int]:
        """Write the final files, once all batches of all ranks are committed.

        Returns:
            Numbers of images, of those without masks and those unreadable, of masks, and of what
            each rule dropped.

        Raises:
            StoreError: Batches are missing, an embedding is not what was written, or the files
                cannot be.
        """
        done = self._scan()
        if missing := len(self.batches) - len(done):
            raise StoreError(
                f'{self.folder}: {missing} of {len(self.batches)} batches are missing: start the '
                'same command again.'
            )
        place = {
            position: (done[b].shard, span)
            for b, positions in enumerate(self.batches)
            for position, span in zip(positions, done[b].spans, strict=True)
        }
        shape = (
            sum(batch.rows for batch in done.values()),
            max((batch.columns for batch in done.values()), default=0),
        )
        statuses: list[dict] = []
        with self._room_needed():
            with (
                atomic_write(self.folder / LABELS) as labels,
                atomic_write(self.folder / EMBEDDINGS, 'wb') as vectors,
            ):
                np.lib.format.write_array_header_1_0(
                    vectors, dict(descr='<f2', fortran_order=False, shape=shape)
                )
                counts = self._merge(place, labels, vectors, statuses)
            images = [image | status for image, status in zip(self.images, statuses, strict=True)]
            files = {name: _digest(self.folder / name) for name in (LABELS, EMBEDDINGS)}
            with atomic_write(self.folder / 'manifest.json') as file:
                json.dump(self._manifest | dict(images=images, files=files), file)
        return counts

    def close(self) -> None:
        """Give up the locks."""
        for file in [*self._files, *self._locks]:
            file.close()
        self._files, self._locks = [], []

    @contextmanager
    def _room_needed(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(
                f'{self.folder}: it could not be written to ({error.strerror or error}). All '
                'batches before this are safe: free some space and start the same command again.'
            ) from error

    def _merge(
        self,
        place: Mapping[int, tuple[Path, tuple[int, int]]],
        labels: IO[str],
        vectors: BinaryIO,
        statuses: list[dict],
    ) -> dict[str, int]:
        """Write the two files, fill in a status for each image, and count."""
        counts = defaultdict(int, images=len(self.images), unreadable=0, without_masks=0, masks=0)
        labels.write('{"info": ' + json.dumps(dict(config=self._manifest['hash'])))
        labels.write(f', "categories": {json.dumps(CATEGORIES)}, "annotations": [')
        separator = '\n'
        with _Shards() as shards:
            for position, image in enumerate(self.images):
                reason, record = image.get('unreadable'), {}
                if position in place:
                    shard, (start, stop) = place[position]
                    record = json.loads(shards.read(shard, start, stop))
                    reason = record.get('unreadable')
                    start, length, crc = record['embeddings']
                    block = shards.read(shard.with_suffix('.f16'), start, start + length)
                    if zlib.crc32(block) != crc:
                        raise StoreError(_damaged(shard.with_suffix('.f16'), shard))
                    vectors.write(block)
                    for found in record['objects']:
                        counts['masks'] += 1
                        annotation = dict(id=counts['masks'], image_id=image['id'], category_id=1)
                        labels.write(separator + json.dumps(annotation | found | dict(iscrowd=0)))
                        separator = ',\n'
                    for rule, number in record.get('dropped', {}).items():
                        counts[f'dropped_{rule}'] += number
                if reason is not None:
                    status: dict = dict(status='unreadable', unreadable=reason)
                    counts['unreadable'] += 1
                elif record['objects']:
                    status = dict(status='done')
                else:
                    status = dict(status='without masks')
                    counts['without_masks'] += 1
                if 'dropped' in record:
                    status['dropped'] = record['dropped']
                statuses.append(status)
        labels.write('\n], "images": [')
        separator = '\n'
        for image, status in zip(self.images, statuses, strict=True):
            if status['status'] != 'unreadable':
                labels.write(separator + json.dumps(dict(image)))
                separator = ',\n'
        labels.write('\n]}\n')
        return dict(counts)

    def _claim(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        shards = sorted((self.folder / 'shards').glob('*.jsonl'))
        for path in [self.folder / 'lock', *shards]:
            file = open(path, 'ab')
            if not _locked(file):
                file.close()
                self.close()
                raise StoreError(
                    f'{self.folder}: another run is on this store: wait for its end, or give this '
                    'one a folder of its own.'
                )
            if path in shards:
                file.close()
            else:
                self._locks.append(file)
        for name in ('manifest.json', LABELS, EMBEDDINGS):  # of a run that was killed as it wrote
            for leftover in self.folder.glob(f'.{name}.*.tmp'):
                leftover.unlink()
        path = self.folder / 'manifest.json'
        if not path.exists():
            if shards:
                raise StoreError(
                    f'{path} is missing beside the shards of a run: put it back, or start with an '
                    'empty folder.'
                )
            with atomic_write(path) as file:
                json.dump(self._manifest, file)
            return
        try:
            self._check(read_json(path))
        except ValueError as error:
            self.close()
            raise StoreError(f'{error} Or choose another folder for the labels.') from None
        except StoreError:
            self.close()
            raise

    def _check(self, old: Any) -> None:
        if not isinstance(old, dict) or not self._manifest.keys() <= old.keys():
            raise StoreError(f'{self.folder}: its manifest.json is no manifest of a store.')
        if old['hash'] != self._manifest['hash']:
            changed = _difference(old['config'], self._manifest['config'])
            raise StoreError(
                f'{self.folder}: these labels were begun with another configuration ({changed}). '
                'Labels of two do not mix: go back to it, or choose another folder.'
            )
        if old['batch_size'] != self._manifest['batch_size']:
            raise StoreError(
                f'{self.folder}: begun with batches of {old["batch_size"]}, not of '
                f'{self._manifest["batch_size"]}; the plan of a store stays what it is.'
            )
        keys = ('id', 'file_name', 'height', 'width')
        before, now = (
            [tuple(image[key] for key in keys) for image in images]
            for images in (old['images'], self.images)
        )
        if before != now:
            new, gone = len({*now} - {*before}), len({*before} - {*now})
            what = f'{new} are new, {gone} are gone or of another size'
            raise StoreError(
                f'{self.folder}: its images have changed since it was begun '
                f'({what if new or gone else "their order"}): bring them back, or choose another '
                'folder for the labels.'
            )
        for name, digest in old.get('files', {}).items():
            path = self.folder / name
            if path.exists() and _digest(path) != digest:
                raise StoreError(
                    f'{path} was changed after it was made, and would be overwritten: move it to '
                    'another folder.'
                )

    def _new_shard(self) -> list[BinaryIO]:
        folder = self.folder / 'shards'
        folder.mkdir(exist_ok=True)
        number = 0
        while (path := folder / f'{self.rank:03d}-{number:04d}.jsonl').exists():
            number += 1
        self._files = [open(path, 'xb'), open(path.with_suffix('.f16'), 'wb')]
        fcntl.flock(self._files[0], fcntl.LOCK_EX)
        return self._files

    def _scan(self) -> dict[int, _Committed]:
        """The committed batches by number."""
        done: dict[int, _Committed] = {}
        for shard in sorted((self.folder / 'shards').glob('*.jsonl')):
            with open(shard, 'rb') as file:
                start, crc, spans = 0, 0, []
                for line in file:
                    if not line.endswith(b'\n'):
                        break  # cut off in the writing
                    stop = start + len(line)
                    if line.startswith(b'{"batch"'):
                        batch = self._committed(line, shard, crc, spans)
                        done.setdefault(*batch)
                        crc, spans = 0, []
                    else:
                        crc = zlib.crc32(line, crc)
                        spans.append((start, stop))
                    start = stop
        return done

    def _committed(
        self, line: bytes, shard: Path, crc: int, spans: list[tuple[int, int]]
    ) -> tuple[int, _Committed]:
        try:
            commit = json.loads(line)
            whole = commit['crc'] == crc and len(spans) == len(self.batches[commit['batch']])
            found = _Committed(shard, spans, commit['rows'], commit['columns'])
        except (ValueError, KeyError, IndexError, TypeError):
            whole = False
        if not whole:
            raise StoreError(_damaged(shard, shard))
        return commit['batch'], found


def fingerprint(config: Mapping) -> str:
    """A short hash of a configuration, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def _record(position: int, found: PseudoLabels, offset: int, block: np.ndarray) -> dict:
    objects = [
        dict(
            segmentation=rle,
            bbox=[round(float(v), 2) for v in (x1, y1, x2 - x1, y2 - y1)],
            area=int(area),
            score=round(float(score), 6),
        )
        for rle, (x1, y1, x2, y2), area, score in zip(
            found.rles, found.boxes_xyxy, found.areas, found.scores, strict=True
        )
    ]
    record: dict = dict(position=position, objects=objects)
    record['embeddings'] = [offset, block.nbytes, zlib.crc32(block.tobytes())]
    if found.unreadable is not None:
        record['unreadable'] = found.unreadable
    if found.dropped:
        record['dropped'] = dict(found.dropped)
    return record


class _Shards:
    """Opened files, read at random."""

    def __init__(self) -> None:
        self._open: dict[Path, BinaryIO] = {}

    def __enter__(self) -> '_Shards':
        return self

    def __exit__(self, *_) -> None:
        for file in self._open.values():
            file.close()

    def read(self, path: Path, start: int, stop: int) -> bytes:
        if path not in self._open:
            try:
                self._open[path] = open(path, 'rb')
            except FileNotFoundError:
                raise StoreError(_damaged(path, path.with_suffix('.jsonl'))) from None
        file = self._open[path]
        file.seek(start)
        return file.read(stop - start)


def _locked(file: BinaryIO) -> bool:
    """Whether the lock could be had; data workers outlive a killed run by some seconds."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
        time.sleep(0.2)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _damaged(path: Path, shard: Path) -> str:
    return (
        f'{path} was damaged or edited. Delete {shard.name} and its .f16: the batches in it are '
        'done again, the others stay.'
    )


def _digest(path: Path) -> str:
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def _difference(old: Any, new: Any, name: str = '') -> str:
    """The first value that differs, by its dotted name."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                return _difference(old.get(key), new.get(key), f'{name}.{key}'.lstrip('.'))
    return f'{name} was {old!r}, is {new!r}'
