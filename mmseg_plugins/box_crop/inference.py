"""Masks for boxes: an image decoded once, its crops in batches, no float frame for each box."""

import math
import os
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from logging import WARNING

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from mmengine.runner import load_checkpoint
from mmseg.registry import MODELS
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mmdet_plugins.common.runtime  # noqa: F401  (safe checkpoint loading)
from mmdet_plugins.ops.crops import Run, crop_masks, crop_resize, crop_threads, expand_boxes
from mmdet_plugins.ops.images import read_image
from mmdet_plugins.ops.rle import RLE, encode_columns, encode_crops

_MB = 2**20
_GROUP = 64  # crops whose masks are made and encoded together


class BoxSegmenter:
    """Segment the object in each of many boxes, wherever the boxes come from.

    Args:
        config: An mmseg config (path or ``Config``) with :class:`BoxCropFromMask` and ``Resize`` in
            its pipelines, or a built mmseg segmentor, or any module that maps uint8 BGR crops
            ``[N, 3, h, w]`` to logits ``[N, 2, a, b]`` (background, object) or ``[N, 1, a, b]``.
        checkpoint: Weights for a model built from a config. ``None`` leaves them random.
        device: Defaults to the GPU if there is one.
        batch_size: Most crops that go through the network at once; by default 32 on CUDA and 8 on
            the CPU, whose caches hold no more.
        amp: ``'bf16'`` (or True), ``'fp16'`` (CUDA only), or False for float32.
        flip: Add the logits of the mirrored crop, as the paper does at test time.
        margin_px: Margin around each box. With a config it is the one the model was trained with,
            and giving another one is refused; without, it defaults to 20.
        size_hw: Size of the network's input; handled like ``margin_px``, by default 512 x 512.
        memory_budget_mb: What one call may take beyond the weights: frame, crops, activations (as
            measured on the first crop) and masks. Batches shrink to stay within it.
    """

    def __init__(
        self,
        config: str | os.PathLike | Config | nn.Module,
        checkpoint: str | os.PathLike | None = None,
        device: str | torch.device | None = None,
        batch_size: int | None = None,
        amp: bool | str = False,
        flip: bool = True,
        margin_px: int | None = None,
        size_hw: tuple[int, int] | None = None,
        memory_budget_mb: float = 4096,
    ) -> None:
        self.device = torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu'))
        if batch_size is None:
            batch_size = 8 if self.device.type == 'cpu' else 32
        if batch_size < 1:
            raise ValueError(f'batch_size must be at least 1, got {batch_size}')
        trained = {}
        if isinstance(config, nn.Module):
            if checkpoint is not None:
                raise ValueError('a checkpoint goes with a config; load it into the module instead')
            model = config
        else:
            config = config if isinstance(config, Config) else Config.fromfile(config)
            trained = _trained_geometry(config)
            model = _build(config, checkpoint)
        self.margin_px = _agreed('margin_px', margin_px, trained, 20)
        self.size_hw = _agreed('size_hw', size_hw, trained, (512, 512))
        if getattr(model, 'align_corners', False):
            raise ValueError('a head with align_corners=True resamples in another way: use False')
        self.model = model.to(self.device).eval()
        self.batch_size = batch_size
        self.amp_dtype = _amp_dtype(amp, self.device)
        self.flip = flip
        self.memory_budget_mb = memory_budget_mb
        self._network_bytes: list[int] = []  # peaks with one crop and with two
        self._inputs: Tensor | None = None
        self._warned_empty = False

    def __call__(
        self, image: str | os.PathLike | bytes | np.ndarray, boxes_xyxy, output: str = 'rle'
    ) -> list[RLE] | np.ndarray:
        """Segment the boxes of one image.

        Args:
            image: A path, the bytes of an image file, or a BGR uint8 array ``[H, W, 3]``.
            boxes_xyxy: ``[N, 4]`` in pixels of the image. Parts outside the image are cut off; a
                box without area inside it gets an empty mask, with one warning.
            output: ``'rle'`` (JSON-ready COCO encodings) or ``'dense'``.

        Returns:
            N encodings, or bool ``[N, H, W]``.

        Raises:
            ValueError: If the image cannot be decoded, a box has NaN or is inverted, or the memory
                budget is too small for the image or for dense masks.
        """
        if output not in ('rle', 'dense'):
            raise ValueError(f"output must be 'rle' or 'dense', got {output!r}")
        pixels = read_image(image)
        image_hw = pixels.shape[:2]
        if isinstance(boxes_xyxy, Tensor):
            boxes_xyxy = boxes_xyxy.detach().cpu().numpy()
        crops = expand_boxes(boxes_xyxy, self.margin_px, image_hw)
        used, where = np.unique(crops, axis=0, return_inverse=True)  # equal crops go through once
        owners = [[] for _ in used]
        for box, crop in enumerate(where.reshape(-1)):
            owners[crop].append(box)
        if len(used) and not used[0, 2:].all():  # 0, 0, 0, 0 comes first: boxes without area
            self._warn_empty(len(owners[0]), len(crops), image_hw)
            used, owners = used[1:], owners[1:]

        if output == 'dense':
            masks = self._zeros(len(crops), image_hw)
            for start, _, columns in self._groups(pixels, used, masks.nbytes):
                for index, column in enumerate(columns, start):
                    x1, y1, x2, y2 = used[index]
                    masks[owners[index], y1:y2, x1:x2] = column.cpu().numpy().view(bool).T
            return masks
        nothing = encode_crops([np.zeros((0, 0))], [(0, 0)], image_hw)[0]
        rles = [nothing] * len(crops)
        for start, buffer, columns in self._groups(pixels, used):
            part = used[start : start + len(columns)]
            shapes_hw = part[:, [3, 2]] - part[:, [1, 0]]
            encoded = encode_columns(buffer, shapes_hw, part[:, :2], image_hw)
            for index, rle in enumerate(encoded, start):
                for box in owners[index]:
                    rles[box] = rle
        return [dict(size=[*rle['size']], counts=rle['counts']) for rle in rles]

    def _groups(
        self, pixels: np.ndarray, crops: np.ndarray, held_bytes: int = 0
    ) -> Iterator[tuple[int, Tensor, list[Tensor]]]:
        """Yield each group's first crop, mask buffer and masks (see :func:`crop_masks`)."""
        frame = torch.from_numpy(pixels).to(self.device)
        mask_px = (crops[:, 2] - crops[:, 0]) * (crops[:, 3] - crops[:, 1] + 1)
        mask_bytes = 3 * int(mask_px.max(initial=1))  # the buffer, its shifted comparison, runs
        share = self.memory_budget_mb * _MB / 8
        size = int(min(share // mask_bytes, _GROUP, len(crops))) or 1
        workers = min(torch.get_num_threads(), size) if frame.device.type == 'cpu' else 1
        held_bytes += 2 * pixels.nbytes  # the decoded file's, and the frame on its device
        held_bytes += mask_bytes * (size + 2 * workers)  # and one float map a worker
        with crop_threads(workers) as run:
            for start in range(0, len(crops), size):
                part = crops[start : start + size]
                logits = torch.cat(list(self._batches(frame, part, held_bytes, run)))
                yield start, *crop_masks(logits, part, run)

    def _batches(
        self, frame: Tensor, crops: np.ndarray, held_bytes: int, run: Run
    ) -> Iterator[Tensor]:
        """Yield the logits of as many crops at a time as the budget and the device allow."""
        views = 1 + self.flip
        crop_px = self.size_hw[0] * self.size_hw[1]
        input_bytes = 3 * views * crop_px
        if self.device.type != 'cpu':  # sampled as float, at coordinates of a grid
            input_bytes += 4 * (3 + 2) * crop_px
            held_bytes += 4 * frame.numel()
        start = 0
        while start < len(crops):
            affordable = self._affordable(input_bytes, held_bytes)
            count = min(self.batch_size, affordable, len(crops) - start)
            logits = None
            try:
                part = crops[start : start + count]
                room = self._room(views * count, frame)
                inputs = crop_resize(frame, part, self.size_hw, self.flip, room, run)
                logits = self._logits(inputs)
            except torch.cuda.OutOfMemoryError:
                if count == 1:
                    raise
            if logits is None:  # not in the handler: its traceback still holds the tensors
                self.batch_size, self._inputs, room, inputs = count // 2, None, None, None
                torch.cuda.empty_cache()
                print_log(
                    f'Out of memory at {count} crops: {self.batch_size} at a time from now on',
                    'current',
                    WARNING,
                )
                continue
            yield logits
            start += count

    def _room(self, number: int, frame: Tensor) -> Tensor:
        """Room for the network's input, kept from batch to batch: fresh pages are dear."""
        if self._inputs is None or len(self._inputs) < number:
            self._inputs = None  # the old room goes before the new one comes
            self._inputs = frame.new_empty(number, *self.size_hw, 3)
        return self._inputs[:number]

    def _affordable(self, crop_bytes: int, held_bytes: int) -> int:
        """Number of crops the budget allows; measures the network on one crop, then on two."""
        network = self._network_bytes
        if not network:
            fixed, each = 0, 0
        elif len(network) == 1:
            fixed, each = 0, network[0]
        else:
            each = max(network[1] - network[0], 0)
            fixed = network[0] - each
        budget = self.memory_budget_mb * _MB
        count = (budget - held_bytes - fixed) // (crop_bytes + each)
        if count < 1:
            needed = math.ceil((held_bytes + fixed + crop_bytes + each) / _MB)
            raise ValueError(
                f'memory_budget_mb={self.memory_budget_mb} is too small for this image: '
                f'one crop at a time takes {needed} MB'
            )
        return int(min(count, len(network) + 1)) if len(network) < 2 else int(count)

    def _logits(self, inputs: Tensor) -> Tensor:
        """Foreground minus background, float32 ``[N, a, b]``, the mirrored half added if any."""
        amp = torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)
        number = len(inputs) // (1 + self.flip)
        measure = number == len(self._network_bytes) + 1 and number <= 2
        with torch.inference_mode(), amp, _PeakBytes() if measure else nullcontext() as peak:
            if isinstance(self.model, BaseModel):
                batch = self.model.data_preprocessor(dict(inputs=list(inputs)))
                output = self.model(batch['inputs'], mode='tensor')
            else:
                output = self.model(inputs)
            if output.shape[1] == 2:
                logits = output[:, 1].float() - output[:, 0].float()
            elif output.shape[1] == 1:
                threshold = (
                    getattr(getattr(self.model, 'decode_head', None), 'threshold', None) or 0.5
                )
                logits = output[:, 0].float() - math.log(threshold / (1 - threshold))
            else:
                raise ValueError(
                    f'the network gives {output.shape[1]} classes, not two: background, object'
                )
            if self.flip:
                logits = logits[:number] + logits[number:].flip(2)
        if measure:
            self._network_bytes.append(peak.bytes)
        return logits

    def _zeros(self, number: int, image_hw: tuple[int, int]) -> np.ndarray:
        needed = number * image_hw[0] * image_hw[1]
        if needed > self.memory_budget_mb * _MB:
            raise ValueError(
                f'{number} dense masks of {image_hw[0]} x {image_hw[1]} pixels take '
                f"{needed // _MB} MB, memory_budget_mb={self.memory_budget_mb}: use output='rle'"
            )
        return np.zeros((number, *image_hw), dtype=bool)

    def _warn_empty(self, number: int, of: int, image_hw: tuple[int, int]) -> None:
        if not self._warned_empty:
            print_log(
                f'{number} of {of} boxes have no area inside the {image_hw[0]} x {image_hw[1]} '
                'image: their masks are empty (said once)',
                'current',
                WARNING,
            )
        self._warned_empty = True


class _PeakBytes(TorchDispatchMode):
    """Most bytes held at once by the tensors that are made inside, on any device.

    The allocator's own statistics would do on CUDA, but resetting them disturbs their other users.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self._held = 0
        self._seen = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._seen.add(tensor.untyped_storage())
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self._seen:
                storage = tensor.untyped_storage()
                self._seen.add(storage)
                self._held += storage.nbytes()
                weakref.finalize(storage, self._release, storage.nbytes())
        self.bytes = max(self.bytes, self._held)
        return result

    def _release(self, number: int) -> None:
        self._held -= number


def _trained_geometry(config: Config) -> dict:
    """Margin and input size of every crop in the config's data loaders, which must be the same."""
    found = {}
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        for pipeline in _pipelines(config.get(name)):
            kinds = [transform['type'] for transform in pipeline]
            crop = pipeline[kinds.index('BoxCropFromMask')]
            resize = pipeline[kinds.index('Resize')] if 'Resize' in kinds else {}
            scale = resize.get('scale')
            if not isinstance(scale, tuple | list) or resize.get('keep_ratio', False):
                raise ValueError(f'{name} needs a Resize with scale=(w, h) and keep_ratio=False')
            geometry = dict(margin_px=crop.get('margin_px', 20), size_hw=(scale[1], scale[0]))
            found.setdefault(str(geometry), (name, geometry))
    if len(found) > 1:
        (one, first), (other, second) = list(found.values())[:2]
        raise ValueError(f'the config crops differently: {one} {first}, {other} {second}')
    return next(iter(found.values()))[1] if found else {}


def _pipelines(node) -> Iterator[list]:
    """Every pipeline under ``node`` that crops."""
    if isinstance(node, dict):
        for value in node.values():
            yield from _pipelines(value)
    elif isinstance(node, list | tuple):
        if any(isinstance(v, dict) and v.get('type') == 'BoxCropFromMask' for v in node):
            yield list(node)
        for value in node:
            yield from _pipelines(value)


def _agreed(name: str, given, trained: dict, default):
    value = trained.get(name, default if given is None else given)
    value = tuple(value) if isinstance(value, list) else value
    if given is not None and (tuple(given) if isinstance(given, list) else given) != value:
        raise ValueError(f'the model was trained with {name}={value}, not {given}')
    return value


def _amp_dtype(amp: bool | str, device: torch.device) -> torch.dtype | None:
    choices = {False: None, True: torch.bfloat16, 'bf16': torch.bfloat16, 'fp16': torch.float16}
    if amp not in choices or (amp == 'fp16' and device.type == 'cpu'):
        raise ValueError(f"amp={amp!r} on {device.type}: use False or 'bf16', on CUDA also 'fp16'")
    return choices[amp]


def _build(config: Config, checkpoint: str | os.PathLike | None) -> nn.Module:
    # In mmseg's scope, then back to the caller's: a detector of mmdet may live in this process too.
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(config.model)
    if checkpoint is None:
        print_log('BoxSegmenter without a checkpoint: its weights are random', 'current', WARNING)
    else:
        load_checkpoint(model, str(checkpoint), map_location='cpu', strict=True)
    return model
