"""Find and outline every object of many images: boxes by a detector, then a mask in each box.

    python projects/uvo/two_stage.py IMAGES OUT.json \\
        --detector CONFIG CHECKPOINT --segmenter CONFIG CHECKPOINT

IMAGES is a folder or a COCO JSON; OUT.json is a list of COCO results in the form of the UVO
challenge, best score first in each image. Finished images are kept beside OUT.json as lines of
``OUT.json.parts/*.jsonl``, so that a run that was killed goes on where it was: at most the image in
work is lost. The parts know the configs, checkpoints and options that made them and are never mixed
with others. An image that cannot be read or worked on is named, listed in ``OUT.json.failed.json``
and tried again by the next run; the others go on, and the exit status is 1.
"""

import argparse
import fcntl
import json
import os
import queue
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

import cv2
import numpy as np
import torch
import torch.multiprocessing as mp
from mmengine.config import Config, ConfigDict
from mmengine.dataset import Compose, pseudo_collate
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope
from mmengine.runner import load_checkpoint

import mmdet_plugins.common.runtime  # noqa: F401  (safe checkpoint loading)
from mmdet_plugins.common.files import atomic_write
from mmdet_plugins.common.stages import config_digest, digest
from mmdet_plugins.ops.coco_json import bad_entries, read_json
from mmdet_plugins.ops.images import read_image

CATEGORY_ID = 1
IMAGE_SUFFIXES = {'.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp'}


class Image(NamedTuple):
    """An image to work on; ``hw`` is what its JSON says, None for an image of a folder."""

    id: int
    name: str
    path: Path
    hw: tuple[int, int] | None


class Model(NamedTuple):
    """A config and a checkpoint; without the latter the model keeps its initial random weights."""

    config: str
    checkpoint: str | None


def list_images(source: Path, image_root: Path | None) -> list[Image]:
    """Images of a folder, numbered from 1 by name, or of a COCO JSON.

    The files of a JSON lie in ``image_root``; by default in the folder ``images`` beside the JSON
    where there is one, else in the folder of the JSON.
    """
    if source.is_dir():
        paths = sorted(p for p in source.rglob('*') if p.suffix.lower() in IMAGE_SUFFIXES)
        images = [
            Image(i, str(path.relative_to(source)), path, None) for i, path in enumerate(paths, 1)
        ]
    else:
        content = _read_json(source)
        listed = content.get('images') if isinstance(content, dict) else None
        if not isinstance(listed, list):
            raise SystemExit(f'{source}: not a COCO JSON, it has no list "images"')
        for _, _, where, what in bad_entries(dict(images=listed, annotations=[], categories=[])):
            raise SystemExit(f'{source}: {where} {what}')
        folder = source.parent / 'images'
        root = image_root or (folder if folder.is_dir() else source.parent)
        images = [
            Image(i['id'], i['file_name'], root / i['file_name'], (i['height'], i['width']))
            for i in listed
        ]
    if not images:
        raise SystemExit(f'{source}: no image found')
    return images


def read_boxes(path: Path, images: list[Image]) -> dict[int, list[dict]]:
    """Boxes from elsewhere by image id: COCO results, or annotations of a COCO JSON (score 1)."""
    content = _read_json(path)
    records = content.get('annotations') if isinstance(content, dict) else content
    boxes = defaultdict(list)
    try:
        for record in records:
            boxes[record['image_id']].append(record)
            record.setdefault('score', 1.0)
            record['bbox'][3]
    except (TypeError, KeyError, IndexError) as error:
        raise SystemExit(
            f'{path}: wants a list of records with image_id, bbox [x, y, w, h] and score'
        ) from error
    if unknown := set(boxes) - {image.id for image in images}:
        raise SystemExit(
            f'{path}: {len(unknown)} image ids are not among the images, such as {min(unknown)}'
        )
    return boxes


class Detector:
    """A detector of MMDetection on decoded images.

    ``mmdet.apis.init_detector`` builds the config's test set only to learn class names; here no
    annotation file is needed, and MMSegmentation may be at work in the same process.

    Args:
        model: config and checkpoint.
        device: where it runs.
        tta: use the config's ``tta_model`` and ``tta_pipeline``.
    """

    def __init__(self, model: Model, device: str, tta: bool = False) -> None:
        from mmdet.registry import MODELS
        from mmdet.utils import get_test_pipeline_cfg, register_all_modules

        register_all_modules(init_default_scope=False)
        cfg = Config.fromfile(model.config)
        with DefaultScope.overwrite_default_scope('mmdet'):
            if tta and 'tta_model' not in cfg:
                raise SystemExit(f'{model.config}: --tta needs tta_model and tta_pipeline in it')
            steps = cfg.tta_pipeline if tta else get_test_pipeline_cfg(cfg)
            steps = [step for step in steps if not step['type'].startswith('Load')]
            self.pipeline = Compose([dict(type='LoadImageFromNDArray'), *steps])
            self.model = MODELS.build(
                ConfigDict(**cfg.tta_model, module=cfg.model) if tta else cfg.model
            )
            inner = self.model.module if tta else self.model
            if model.checkpoint:
                load_checkpoint(inner, model.checkpoint, map_location='cpu')
            else:
                logger = MMLogger.get_current_instance()
                level = logger.level
                logger.setLevel('WARNING')  # or every parameter is logged
                inner.init_weights()
                logger.setLevel(level)
        self.model.to(device).eval()

    @torch.inference_mode()
    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boxes [N, 4] xyxy px and scores [N] of an image [H, W, 3] uint8 BGR, best first."""
        with DefaultScope.overwrite_default_scope('mmdet'):
            data = self.pipeline(dict(img=image, img_id=0))
            found = self.model.test_step(pseudo_collate([data]))[0].pred_instances
        order = found.scores.argsort(descending=True, stable=True)
        return found.bboxes[order].float().cpu().numpy(), found.scores[order].float().cpu().numpy()


class Parts:
    """The folder of finished images: ``manifest.json`` with the settings, one file a process."""

    def __init__(self, folder: Path, settings: dict) -> None:
        self.folder = folder
        manifest = folder / 'manifest.json'
        if manifest.exists():
            made_with = _read_json(manifest)
            changed = [k for k in settings if settings[k] != made_with.get(k)]
            if changed:
                raise SystemExit(
                    f'{folder} was made with other settings ({", ".join(changed)} differ): '
                    'choose another output file, or start over with --fresh'
                )
        else:
            with atomic_write(manifest) as file:
                json.dump(settings, file, indent=1)

    def path(self, rank: int) -> Path:
        return self.folder / f'{rank:03d}.jsonl'

    def scan(self) -> dict[str, tuple[Path, int]]:
        """Where the record of each finished image lies: file and offset.

        Drops a torn last line; the image of any other broken line counts as not done.
        """
        places = {}
        for path in sorted(self.folder.glob('*.jsonl')):
            with locked(path) as file:
                end = 0
                for line in file:
                    if not line.endswith(b'\n'):
                        break
                    try:
                        record = json.loads(line)
                        if 'failed' not in record:
                            places[record['file']] = path, end
                    except (ValueError, TypeError, KeyError):
                        print(f'{path}: the line at byte {end} is broken and not used', flush=True)
                    end += len(line)
                file.truncate(end)
        return places


@contextmanager
def locked(path: Path) -> Iterator[IO[bytes]]:
    """Open a part for reading and appending, alone; waits for a process that still writes it."""
    with open(path, 'a+b') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f'{path}: waiting for the process that still writes it', flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        yield file


class Options(NamedTuple):
    """How to work; all but ``batch_size``, the crops in one forward pass, shapes the results."""

    detector: Model | None
    segmenter: Model
    max_boxes: int
    score_thr: float
    tta: bool
    amp: bool
    batch_size: int | None

    def settings(self, boxes: Path | None) -> dict:
        """The options with files replaced by digests of what they hold."""
        digests = {}
        for stage in ('detector', 'segmenter'):
            model = getattr(self, stage)
            digests[f'{stage} config'] = model and config_digest(model.config)
            digests[f'{stage} checkpoint'] = model and digest(model.checkpoint)
        numbers = {k: getattr(self, k) for k in ('max_boxes', 'score_thr', 'tta', 'amp')}
        return digests | numbers | {'boxes': digest(boxes)}


def usable_boxes(
    boxes_xyxy: np.ndarray, scores: np.ndarray, hw: tuple[int, int], options: Options
) -> tuple[np.ndarray, np.ndarray]:
    """The best ``max_boxes``, clipped to the image; NaN, empty and outside boxes are dropped."""
    boxes = boxes_xyxy.clip(0, np.array([hw[1], hw[0]] * 2, np.float32))
    sound = np.isfinite(boxes_xyxy).all(1) & np.isfinite(scores) & (scores >= options.score_thr)
    sound &= (boxes[:, 2:] > boxes[:, :2]).all(1)
    order = np.argsort(-scores[sound], kind='stable')[: options.max_boxes]
    return boxes[sound][order], scores[sound][order]


def work(
    images: list[Image], part: Path, device: str, options: Options, boxes: dict | None
) -> Iterator[dict]:
    """Take the images one by one through both stages; append and yield a record for each."""
    from mmseg_plugins.box_crop import BoxSegmenter

    torch.manual_seed(0)  # for weights that no checkpoint gives
    detector = options.detector and Detector(options.detector, device, options.tta)
    segmenter = BoxSegmenter(
        *options.segmenter, device=device, batch_size=options.batch_size, amp=options.amp
    )
    with locked(part) as file:
        for image in images:
            record: dict = dict(file=image.name)
            try:
                pixels = read_image(image.path, image.hw)
                if detector:
                    found = detector(pixels)
                else:
                    given = boxes.get(image.id, [])
                    xywh = np.array([b['bbox'] for b in given], np.float32).reshape(-1, 4)
                    scores = np.array([b['score'] for b in given], np.float32)
                    found = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1), scores
                kept = usable_boxes(*found, pixels.shape[:2], options)
                record['results'] = [
                    dict(
                        bbox=[round(float(v), 2) for v in (x0, y0, x1 - x0, y1 - y0)],
                        score=round(float(score), 6),
                        segmentation=rle,
                    )
                    for (x0, y0, x1, y1), score, rle in zip(
                        *kept, segmenter(pixels, kept[0], output='rle'), strict=True
                    )
                ]
            except (OSError, ValueError, cv2.error, torch.cuda.OutOfMemoryError) as error:
                reason = str(error).removeprefix(f'{image.path} ').strip()
                record['failed'] = f'{image.path}: {reason}'
            file.write(json.dumps(record).encode() + b'\n')
            file.flush()
            os.fsync(file.fileno())
            yield record


def _work_in_process(reports: mp.Queue, parent: int, *job: object) -> None:
    for record in work(*job):
        reports.put((len(record.get('results', [])), record.get('failed')))
        if os.getppid() != parent:
            sys.exit('the parent process is gone')


def run(
    images: list[Image], parts: Parts, devices: list[str], options: Options, boxes: dict | None
) -> list[str]:
    """Work on all images, one process a device, each with its share. Returns what failed."""
    started, done, found, failures = time.time(), 0, 0, []

    def progress(objects: int, failed: str | None) -> None:
        nonlocal done, found
        done, found = done + 1, found + objects
        if failed:
            failures.append(failed)
            print(f'failed: {failed}', flush=True)
        if done == len(images) or done % max(1, len(images) // 20) == 0:
            pace = (time.time() - started) / done
            print(
                f'two stages: {done}/{len(images)} images, {found / done:.1f} objects and '
                f'{pace:.2f} s an image, {pace * (len(images) - done):.0f} s to go',
                flush=True,
            )

    if len(devices) == 1:
        for record in work(images, parts.path(0), devices[0], options, boxes):
            progress(len(record.get('results', [])), record.get('failed'))
        return failures

    spawn = mp.get_context('spawn')
    reports = spawn.Queue()
    workers = [
        spawn.Process(
            target=_work_in_process,
            args=(
                reports,
                os.getpid(),
                images[i :: len(devices)],
                parts.path(i),
                d,
                options,
                boxes,
            ),
        )
        for i, d in enumerate(devices)
    ]
    for worker in workers:
        worker.start()
    while done < len(images):
        alive = any(worker.is_alive() for worker in workers)
        with suppress(queue.Empty):
            progress(*reports.get(timeout=1))
            continue
        if not alive:
            break
    for device, worker in zip(devices, workers, strict=True):
        worker.join()
        if worker.exitcode:
            raise SystemExit(
                f'the process on {device} ended with exit code {worker.exitcode}; finished images '
                'are kept: the same command goes on from there'
            )
    return failures


def write_results(out: Path, images: list[Image], places: dict[str, tuple[Path, int]]) -> int:
    """Join the parts to one COCO results JSON in the order of the images; never all in memory."""
    count = 0
    files: dict[Path, IO[bytes]] = {}
    with atomic_write(out) as file:
        file.write('[')
        for image in images:
            if image.name not in places:
                continue
            path, offset = places[image.name]
            if path not in files:
                files[path] = open(path, 'rb')
            files[path].seek(offset)
            for result in json.loads(files[path].readline())['results']:
                result = dict(image_id=image.id, category_id=CATEGORY_ID, **result)
                file.write((',\n' if count else '\n') + json.dumps(result))
                count += 1
        file.write('\n]\n')
    for part in files.values():
        part.close()
    return count


def _read_json(path: Path) -> dict | list:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('images', type=Path, help='a folder of images, or a COCO JSON')
    parser.add_argument('out', type=Path, help='COCO results JSON to write')
    parser.add_argument('--image-root', type=Path, help='folder of the files a JSON names')
    model = dict(nargs='+', metavar=('CONFIG', 'CHECKPOINT'))
    parser.add_argument('--detector', help='random weights without a checkpoint', **model)
    parser.add_argument('--boxes', type=Path, help='COCO results to use instead of a detector')
    parser.add_argument('--segmenter', required=True, **model)
    parser.add_argument('--max-boxes', type=int, default=100, help='of an image, best first')
    parser.add_argument('--score-thr', type=float, default=0.0)
    parser.add_argument('--tta', action='store_true', help="detect by the config's tta_model")
    parser.add_argument('--amp', action='store_true', help='segment in mixed precision')
    parser.add_argument('--batch-size', type=int, help='crops in one forward pass')
    parser.add_argument('--devices', default=get_device(), help='such as cuda:0,cuda:1 or cpu,cpu')
    parser.add_argument('--fresh', action='store_true', help='forget finished images')
    args = parser.parse_args(argv)
    if (args.detector is None) == (args.boxes is None):
        parser.error('give either --detector or --boxes')

    images = list_images(args.images, args.image_root)
    boxes = read_boxes(args.boxes, images) if args.boxes else None
    options = Options(
        args.detector and Model(*args.detector, *[None] * (2 - len(args.detector))),
        Model(*args.segmenter, *[None] * (2 - len(args.segmenter))),
        args.max_boxes,
        args.score_thr,
        args.tta,
        args.amp,
        args.batch_size,
    )
    folder = args.out.with_name(args.out.name + '.parts')
    if args.fresh and folder.is_dir():
        for path in folder.iterdir():
            path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    parts = Parts(folder, options.settings(args.boxes))
    done = parts.scan()
    left = [image for image in images if image.name not in done]
    if len(left) < len(images):
        print(f'{len(images) - len(left)} of {len(images)} images are done already')
    failures = run(left, parts, args.devices.split(','), options, boxes) if left else []
    count = write_results(args.out, images, parts.scan())
    failed = args.out.with_name(args.out.name + '.failed.json')
    failed.unlink(missing_ok=True)
    if failures:
        with atomic_write(failed) as file:
            json.dump(failures, file, indent=1)
    if args.images.is_dir():
        listing = [dict(id=image.id, file_name=image.name) for image in images]
        with atomic_write(args.out.with_name(args.out.name + '.images.json')) as file:
            json.dump(dict(images=listing), file)
    print(f'{count} objects in {len(images) - len(failures)} images: {args.out}')
    if failures:
        print(f'{len(failures)} of {len(images)} images failed, listed in {failed}')
    return int(bool(failures))


if __name__ == '__main__':
    sys.exit(main())
