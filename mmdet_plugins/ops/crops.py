"""Boxes to crops and crops to masks, for many boxes of one image at once.

Shapes: N boxes, ``H W C`` the frame, ``h w`` the size every crop is resized to, ``a b`` the size of
the logit maps a network gives for them. Boxes are ``xyxy`` in pixels, right and bottom exclusive.

The sampling is OpenCV's ``INTER_LINEAR`` (half-pixel centres, no antialiasing, edge pixels
repeated) of the crop alone: nothing outside the box leaks into it. Crops stay uint8, as mmseg's
pipelines leave them. On the CPU ``cv2.resize`` itself writes into the batch, several times faster
there than torch's resize; on other devices one ``grid_sample`` takes all crops, to within one grey
level (OpenCV interpolates bytes in fixed point).
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .rle import column_buffer

Run = Callable[[Callable[[int], None], int], None]


def expand_boxes(boxes_xyxy, margin_px: float, image_hw: tuple[int, int]) -> np.ndarray:
    """Add a margin on all sides, go outwards to whole pixels, clip to the image.

    Args:
        boxes_xyxy: ``[N, 4]`` boxes, anything NumPy reads.
        margin_px: Margin in pixels.
        image_hw: Size of the image.

    Returns:
        int64 ``[N, 4]``. Boxes that have no area inside the image become ``0, 0, 0, 0``.

    Raises:
        ValueError: If a coordinate is NaN, or a right or bottom lies before its left or top.
    """
    boxes = np.asarray(boxes_xyxy, dtype=np.float64).reshape(-1, 4)
    with np.errstate(invalid='ignore'):
        broken = ~((boxes[:, 2:] >= boxes[:, :2]).all(1))
    if broken.any():
        index = int(broken.argmax())
        raise ValueError(
            f'box {index} is {boxes[index].tolist()}: NaN, or not x1 <= x2 and y1 <= y2 '
            '(boxes are left, top, right, bottom in pixels)'
        )
    limit = np.array([*image_hw[::-1]] * 2, dtype=np.float64)
    inside = boxes.clip(0, limit)
    empty = (inside[:, 2:] <= inside[:, :2]).any(1)
    boxes = np.concatenate((boxes[:, :2] - margin_px, boxes[:, 2:] + margin_px), axis=1)
    boxes = boxes.clip(0, limit)
    boxes = np.concatenate((np.floor(boxes[:, :2]), np.ceil(boxes[:, 2:])), axis=1).astype(np.int64)
    boxes[empty] = 0
    return boxes


@contextmanager
def crop_threads(workers: int) -> Iterator[Run]:
    """Yield what runs a function of an index for all indices below a number, in threads.

    Each of the ``workers`` takes every so-many-th index: one task a thread.
    """
    with ThreadPoolExecutor(workers) as pool:

        def run(function: Callable[[int], None], number: int) -> None:
            def share(first: int) -> None:
                for index in range(first, number, workers):
                    function(index)

            list(pool.map(share, range(min(workers, number))))

        yield run


def run_in_turn(function: Callable[[int], None], number: int) -> None:
    """Do what :func:`crop_threads` yields, without threads."""
    for index in range(number):
        function(index)


def crop_resize(
    frame: Tensor,
    boxes_xyxy: np.ndarray,
    size_hw: tuple[int, int],
    flip: bool = False,
    out: Tensor | None = None,
    run: Run = run_in_turn,
) -> Tensor:
    """Resize N crops of a frame to one size.

    Args:
        frame: uint8 ``[H, W, C]``.
        boxes_xyxy: int ``[N, 4]`` inside the frame, none empty.
        size_hw: ``h, w``.
        flip: Append the N crops once more, mirrored left to right.
        out: uint8 ``[N or 2N, h, w, C]`` to write into, on the device of the frame.
        run: What goes through the crops on the CPU; :func:`crop_threads` yields a faster one.

    Returns:
        uint8 ``[N, C, h, w]``, or ``[2N, C, h, w]`` with ``flip``: a view, channels last in memory.
    """
    number = len(boxes_xyxy)
    if out is None:
        out = frame.new_empty(number * (1 + flip), *size_hw, frame.shape[2])
    if frame.device.type != 'cpu':
        out[:number] = _grid_crops(frame, boxes_xyxy, size_hw).permute(0, 2, 3, 1)
        if flip:
            out[number:] = out[:number].flip(2)
        return out.permute(0, 3, 1, 2)
    pixels, slots = frame.numpy(), out.numpy()

    def sample(index: int) -> None:
        x1, y1, x2, y2 = boxes_xyxy[index]
        crop, slot = pixels[y1:y2, x1:x2], slots[index]
        cv2.resize(crop, size_hw[::-1], dst=slot, interpolation=cv2.INTER_LINEAR)
        if flip:
            cv2.flip(slot, 1, dst=slots[number + index])

    run(sample, number)
    return out.permute(0, 3, 1, 2)


def _grid_crops(frame: Tensor, boxes_xyxy: np.ndarray, size_hw: tuple[int, int]) -> Tensor:
    boxes = torch.as_tensor(boxes_xyxy, dtype=torch.float32).to(frame.device)

    def coordinates(low: Tensor, high: Tensor, length: int, extent: int) -> Tensor:
        steps = torch.arange(length, device=frame.device, dtype=torch.float32) + 0.5
        pixels = low[:, None] + steps * ((high - low) / length)[:, None] - 0.5
        pixels = torch.minimum(torch.maximum(pixels, low[:, None]), high[:, None] - 1)
        return pixels * (2 / max(extent - 1, 1)) - 1

    x = coordinates(boxes[:, 0], boxes[:, 2], size_hw[1], frame.shape[1])
    y = coordinates(boxes[:, 1], boxes[:, 3], size_hw[0], frame.shape[0])
    grid = torch.stack(
        (x[:, None, :].expand(-1, *size_hw), y[:, :, None].expand(-1, *size_hw)), dim=3
    )
    frames = frame.permute(2, 0, 1).float().expand(len(boxes), -1, -1, -1)
    return F.grid_sample(frames, grid, padding_mode='border', align_corners=True).round_()


def crop_masks(
    logits: Tensor,
    boxes_xyxy: np.ndarray,
    run: Run = run_in_turn,
) -> tuple[Tensor, list[Tensor]]:
    """Resample logit maps to their boxes and threshold them at 0.

    Args:
        logits: float32 ``[N, a, b]``; positive is foreground.
        boxes_xyxy: int ``[N, 4]``, none empty.
        run: As in :func:`crop_resize`.

    Returns:
        A filled :func:`~mmdet_plugins.ops.rle.column_buffer` on the device of the logits, and its N
        views: masks as large as their boxes, transposed. Only one box a thread is ever float.
    """
    shapes_hw = [(y2 - y1, x2 - x1) for x1, y1, x2, y2 in boxes_xyxy.tolist()]
    buffer, columns = column_buffer(shapes_hw, logits.device)
    maps = logits.transpose(1, 2).contiguous()
    if logits.device.type != 'cpu':
        for logit, column in zip(maps, columns, strict=True):
            resized = F.interpolate(logit[None, None], column.shape, mode='bilinear')
            column.copy_(resized[0, 0] > 0)
        return buffer, columns
    arrays = maps.numpy()

    def fill(index: int) -> None:
        column = columns[index].numpy()
        resized = cv2.resize(arrays[index], column.shape[::-1], interpolation=cv2.INTER_LINEAR)
        np.greater(resized, 0, out=column.view(bool))

    run(fill, len(columns))
    return buffer, columns
