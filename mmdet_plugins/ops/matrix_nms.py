"""Matrix, Hard, Soft and Fast NMS on masks, exact, for any detector.

Shapes: N (or M) masks of ``H x W`` pixels, given as a dense bool or 0/1 tensor ``[N, H, W]``, as
:class:`PackedMasks`, or as a list of COCO encodings.

The intersections are int8 products with int32 sums. Pairs of different labels, and on the CPU pairs
whose rows do not overlap, are never multiplied. Stock ``mask_matrix_nms`` multiplies all pairs in
float32 and takes two exponentials of each; the results are the same.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .rle import RLE, decode_rle

METHODS = ('matrix', 'hard', 'soft', 'fast')
_BLOCK = 128  # masks multiplied at a time on the CPU
_BLOCK_DEVICE = 1024
_FEW = 400  # pairs, up to which counting bits is faster on the CPU than multiplying bytes


class PackedMasks(NamedTuple):
    """Masks of one size at a bit a pixel, an eighth of their bool tensor.

    Attributes:
        bits: uint8 ``[N, ceil(H * W / 8)]``; pixel ``8 k + b`` of a mask in row-major order is bit
            ``b`` of its byte ``k``, what is left of the last byte is 0.
        image_hw: ``(H, W)``.
    """

    bits: Tensor
    image_hw: tuple[int, int]


Masks = Tensor | PackedMasks | list[RLE]


class NMSResult(NamedTuple):
    """What survives, by falling score; of equal scores the one that came first.

    Attributes:
        scores: float32 ``[n]``, after decay.
        labels: ``[n]``, or None where none were given.
        keep_inds: int64 ``[n]``, positions in the input.
    """

    scores: Tensor
    labels: Tensor | None
    keep_inds: Tensor


def on_cpu(tensor: Tensor) -> bool:
    """Which way to go: masks one after the other on the CPU, in few large steps on a device."""
    return tensor.device.type == 'cpu'


def pack_masks(masks: Tensor) -> PackedMasks:
    """Pack ``[N, H, W]``, bool or bytes 0 and 1, on its device."""
    flat = masks.flatten(1).view(torch.uint8)
    if on_cpu(flat):
        bits = torch.from_numpy(np.packbits(flat.numpy(), axis=1, bitorder='little'))
    else:
        flat = F.pad(flat, (0, -flat.shape[1] % 8)).unflatten(1, (-1, 8))
        places = torch.arange(8, dtype=torch.uint8, device=flat.device)
        bits = (flat << places).sum(2, dtype=torch.uint8)
    return PackedMasks(bits, tuple(masks.shape[1:]))


def unpack_masks(packed: PackedMasks) -> Tensor:
    """Undo :func:`pack_masks`: bool ``[N, H, W]``."""
    height, width = packed.image_hw
    return _unpack(packed.bits)[:, : height * width].view(torch.bool).view(-1, height, width)


def mask_nms(
    masks: Masks,
    scores: Tensor,
    labels: Tensor | None = None,
    *,
    method: str = 'matrix',
    kernel: str = 'gaussian',
    sigma: float = 2.0,
    iou_thr: float = 0.5,
    filter_thr: float = -1,
    nms_pre: int = -1,
    max_num: int = -1,
) -> NMSResult:
    """Suppress duplicate masks.

    ``'matrix'`` is Matrix NMS (section 4.2.2 of Wang's thesis): the score of mask ``j`` is
    multiplied by the least ``f(iou_ij) / f(max_k iou_ki)`` over the masks ``i`` of a higher score.
    It equals mmdet's ``mask_matrix_nms``, and differs from it where that gives NaN: two empty
    masks have an IoU of 0, and under the linear kernel a mask that is already decayed to nothing
    suppresses no other.

    ``'hard'`` removes a mask whose IoU with a kept one of a higher score exceeds ``iou_thr``;
    ``'fast'`` (YOLACT, section 5) one whose IoU with any of a higher score does. ``'soft'``
    (Bodla et al., 2017) takes the best mask again and again and multiplies the scores of the others
    by ``f(iou)``, by the linear kernel only where the IoU reaches ``iou_thr``.

    Args:
        masks: N masks in any of the three forms.
        scores: ``[N]``, not negative, NaN-free.
        labels: ``[N]`` integers; only masks of one label suppress each other. None: all do.
        method: One of ``'matrix'``, ``'hard'``, ``'soft'``, ``'fast'``.
        kernel: ``'gaussian'``, ``f(iou) = exp(-sigma * iou^2)``, or ``'linear'``, ``1 - iou``;
            for the methods that decay.
        sigma: Multiplies, as in the released code and in mmdet. The thesis (equation 4.4) and
            Bodla et al. divide by it: theirs of 0.5 is 2.0 here.
        iou_thr: For all methods but ``'matrix'``.
        filter_thr: Keep scores, after decay, of at least this; all if not positive.
        nms_pre: How many of the highest scores enter; all if not positive.
        max_num: How many are returned at most; all if not positive.

    Raises:
        ValueError: An unknown method or kernel, or sizes that differ.
    """
    num = len(masks.bits if isinstance(masks, PackedMasks) else masks)
    if method not in METHODS:
        raise ValueError(f'method must be one of {", ".join(METHODS)}, got {method!r}')
    if len(scores) != num or (labels is not None and len(labels) != num):
        sizes = f'{len(scores)} scores' + ('' if labels is None else f', {len(labels)} labels')
        raise ValueError(f'{num} masks, but {sizes}')
    ranked, order = scores.float().sort(descending=True, stable=True)
    if 0 < nms_pre < num:
        ranked, order = ranked[:nms_pre], order[:nms_pre]
        masks, part_labels = _take(masks, order), None if labels is None else labels[order]
        iou = mask_iou(masks, part_labels).to(scores.device)
    else:
        iou = mask_iou(masks, labels).to(scores.device)[order][:, order]
    ranked, alive = decay_scores(iou, ranked, method, kernel, sigma, iou_thr)
    if filter_thr > 0:
        alive = alive & (ranked >= filter_thr)
    ranked, order = ranked[alive], order[alive]
    ranked, again = ranked.sort(descending=True, stable=True)
    if max_num > 0:
        ranked, again = ranked[:max_num], again[:max_num]
    order = order[again]
    return NMSResult(ranked, None if labels is None else labels[order], order)


def decay_scores(
    iou: Tensor,
    scores: Tensor,
    method: str = 'matrix',
    kernel: str = 'gaussian',
    sigma: float = 2.0,
    iou_thr: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """Apply one method of :func:`mask_nms`, given ``[N, N]`` IoUs of masks sorted by score.

    Returns:
        The scores ``[N]`` and bool ``[N]``, what is not removed. Hard- and Soft-NMS are sequential:
        they run on the host.
    """
    if kernel not in ('gaussian', 'linear'):
        raise ValueError(f"kernel must be 'gaussian' or 'linear', got {kernel!r}")
    alive = torch.ones_like(scores, dtype=torch.bool)
    if method == 'matrix':
        return scores * matrix_decay(iou, kernel, sigma), alive
    if len(scores) == 0:
        return scores, alive
    if method == 'fast':
        return scores, iou.triu(1).amax(0) <= iou_thr
    overlaps = iou.cpu().numpy()
    if method == 'hard':
        kept = np.ones(len(scores), dtype=bool)
        for i in range(len(kept)):
            if kept[i]:
                kept[i + 1 :] &= overlaps[i, i + 1 :] <= iou_thr
        return scores, torch.from_numpy(kept).to(scores.device)
    if kernel == 'gaussian':
        factors = np.exp(-sigma * overlaps**2)
    else:
        factors = np.where(overlaps >= iou_thr, 1 - overlaps, 1)
    current = scores.cpu().numpy().copy()
    waiting = np.arange(len(current))
    while len(waiting) > 1:
        best = current[waiting].argmax()
        taken, waiting = waiting[best], np.delete(waiting, best)
        current[waiting] *= factors[taken, waiting]
    return torch.from_numpy(current).to(scores.device), alive


def matrix_decay(iou: Tensor, kernel: str = 'gaussian', sigma: float = 2.0) -> Tensor:
    """The factors ``[..., N]`` of Matrix NMS, in ``[0, 1]``, from IoUs ``[..., N, N]``.

    Only what lies above the diagonal is read. The least ratio of exponentials is the exponential of
    the greatest difference: one a mask.
    """
    if iou.shape[-1] == 0:
        return iou.new_zeros(iou.shape[:-1])
    iou = iou.triu(1)
    if kernel == 'gaussian':
        squares = iou.square_()
        most = squares.amax(-2)
        # Never above 1: the mask of the highest score is not compensated.
        return squares.sub_(most[..., None]).amax(-2).clamp_(min=0).mul_(-sigma).exp_()
    ratio = (1 - iou) / (1 - iou.amax(-2))[..., None]
    return ratio.nan_to_num_(nan=1.0).amin(-2).clamp_(max=1)


def mask_iou(masks: Masks, labels: Tensor | None = None) -> Tensor:
    """IoU of all pairs, float32 ``[N, N]``; 0 where labels differ, and for two empty masks."""
    inter = mask_intersections(masks, labels)
    area = inter.diagonal()
    return inter / (area[:, None] + area - inter).clamp_(min=1)


def mask_intersections(
    masks: Masks,
    labels: Tensor | None = None,
    others: Masks | None = None,
    other_labels: Tensor | None = None,
) -> Tensor:
    """Number of common pixels of all pairs, 0 where labels differ.

    Args:
        masks: N masks.
        labels: Their labels ``[N]``.
        others: M masks of the same size; the same masks by default.
        other_labels: Their labels ``[M]``, where both ``labels`` and ``others`` are given.

    Returns:
        float32 ``[N, M]`` on the device of the masks, exact below ``2^24`` pixels.
    """
    mirrored = others is None
    masks = _Source(masks)
    others, other_labels = (masks, labels) if mirrored else (_Source(others), other_labels)
    inter = torch.zeros(len(masks), len(others), device=masks.device)
    for members, other_members in _groups(masks, labels, others, other_labels):
        if not (len(members) and len(other_members)):
            continue
        if on_cpu(masks.store) and len(members) * len(other_members) <= _FEW:
            words = masks.words[members.numpy()]
            common = _count_common(words, others.words[other_members.numpy()])
            inter[members[:, None], other_members] = common
            continue
        bands = list(_bands(masks, members))
        other_bands = bands if mirrored else list(_bands(others, other_members))
        for i, a in enumerate(bands):
            for b in other_bands[: i + 1] if mirrored else other_bands:
                top, bottom = max(a.top, b.top), min(a.bottom, b.bottom)
                if top >= bottom:
                    continue
                common = common_pixels(a.rows(top, bottom), b.rows(top, bottom))
                inter[a.members[:, None], b.members] = common
                if mirrored and a is not b:
                    inter[b.members[:, None], a.members] = common.T
    if labels is not None and not on_cpu(inter):
        inter *= labels.to(inter.device)[:, None] == other_labels.to(inter.device)
    return inter


def _take(masks: Masks, index: Tensor) -> Masks:
    if isinstance(masks, list):
        return [masks[i] for i in index.tolist()]
    if isinstance(masks, PackedMasks):
        return masks._replace(bits=masks.bits[index.to(masks.bits.device)])
    return masks[index.to(masks.device)]


class _Source:
    """Masks of any form, which become dense a few at a time."""

    def __init__(self, masks: Masks):
        if isinstance(masks, list):
            masks = _pack_rles(masks)
        self.packed = isinstance(masks, PackedMasks)
        if self.packed:
            self.store, (self.height, self.width) = masks
        else:
            self.store = masks if masks.element_size() == 1 else masks != 0
            self.height, self.width = masks.shape[1:]
        self.device = self.store.device

    def __len__(self) -> int:
        return len(self.store)

    def dense(self, index: Tensor | None, top: int, bottom: int) -> Tensor:
        """int8 ``[n, bottom - top, W]`` of the masks at ``index``, or of all of them."""
        store = self.store if index is None or not self.packed else self.store[index]
        if self.packed:
            store = _unpack(store)[:, : self.height * self.width]
            store = store.unflatten(1, (self.height, self.width))
        cut = store[:, top:bottom]
        if index is not None and not self.packed:
            cut = cut[index]
        return cut.view(torch.int8)

    @functools.cached_property
    def words(self) -> np.ndarray:
        """The bits of all masks, uint64 ``[N, K]``."""
        bits = (self.store if self.packed else pack_masks(self.store).bits).numpy()
        if pad := -bits.shape[1] % 8:
            bits = np.pad(bits, ((0, 0), (0, pad)))
        return bits.view(np.uint64)


@dataclass
class _Band:
    """Some masks, cut to the rows from ``top`` to before ``bottom``."""

    members: Tensor
    top: int
    bottom: int
    pixels: Tensor

    def rows(self, top: int, bottom: int) -> Tensor:
        """int8 ``[m, (bottom - top) * W]``."""
        return self.pixels[:, top - self.top : bottom - self.top].flatten(1)


def _groups(
    masks: _Source, labels: Tensor | None, others: _Source, other_labels: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Positions of masks that are multiplied with each other: of one label, on the CPU."""
    if labels is None or not on_cpu(masks.store):
        yield tuple(torch.arange(len(x), device=x.device) for x in (masks, others))
        return
    labels, other_labels = labels.cpu().numpy(), other_labels.cpu().numpy()
    for label in np.intersect1d(labels, other_labels):
        yield tuple(torch.from_numpy(np.flatnonzero(x == label)) for x in (labels, other_labels))


def _bands(masks: _Source, members: Tensor) -> Iterator[_Band]:
    """Cut a group into blocks; a large one, on the CPU, by the rows that its masks cover."""
    size = _BLOCK if on_cpu(masks.store) else _BLOCK_DEVICE
    if len(members) <= size:
        index = None if len(members) == len(masks) else members
        yield _Band(members, 0, masks.height, masks.dense(index, 0, masks.height))
        return
    if not on_cpu(masks.store):
        for part in members.split(size):
            yield _Band(part, 0, masks.height, masks.dense(part, 0, masks.height))
        return
    spans = [_row_spans(masks.dense(part, 0, masks.height)) for part in members.split(size)]
    spans = np.concatenate(spans)
    order = spans[:, 0].argsort(kind='stable')
    for part in np.split(order, range(size, len(order), size)):
        index, top, bottom = members[part], int(spans[part, 0].min()), int(spans[part, 1].max())
        yield _Band(index, top, bottom, masks.dense(index, top, bottom))


def _row_spans(pixels: Tensor) -> np.ndarray:
    """First row of each mask, and the row behind its last one, ``[n, 2]``."""
    boxes = np.array([cv2.boundingRect(mask) for mask in pixels.numpy().view(np.uint8)])
    return np.stack([boxes[:, 1], boxes[:, 1] + boxes[:, 3]], axis=1)


def _count_common(words: np.ndarray, others: np.ndarray) -> Tensor:
    rows = [np.bitwise_count(row & others).sum(1, dtype=np.int64) for row in words]
    return torch.from_numpy(np.stack(rows)).float()


def common_pixels(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T``, float32 ``[n, m]``, of int8 zeros and ones ``[n, K]`` and ``[m, K]``; exact."""
    rows, columns = len(a), len(b)
    if not on_cpu(a):  # what cuBLAS asks for: more than 16 rows, multiples of 8
        pad = -a.shape[1] % 8
        a = F.pad(a, (0, pad, 0, -rows % 8 + 16 * (rows <= 16)))
        b = F.pad(b, (0, pad, 0, -columns % 8))
    if a.shape[1] > 1 and _has_int8_product(a.device):  # on the CPU it is wrong for one column
        return torch._int_mm(a, b.t())[:rows, :columns].float()
    with torch.autocast(a.device.type, enabled=False):
        return (a.float() @ b.float().t())[:rows, :columns]


@functools.cache
def _has_int8_product(device: torch.device) -> bool:
    try:
        torch._int_mm(*torch.zeros(2, 32, 32, dtype=torch.int8, device=device))
    except (AttributeError, RuntimeError):  # NotImplementedError is one of the latter
        return False
    return True


def _pack_rles(rles: list[RLE]) -> PackedMasks:
    blocks = [rles[start : start + _BLOCK] for start in range(0, len(rles), _BLOCK)]
    packed = [pack_masks(torch.from_numpy(decode_rle(block))) for block in blocks or [[]]]
    return PackedMasks(torch.cat([p.bits for p in packed]), packed[0].image_hw)


def _unpack(bits: Tensor) -> Tensor:
    """uint8 ``[n, K]`` to zeros and ones ``[n, 8 K]``."""
    if on_cpu(bits):
        return torch.from_numpy(np.unpackbits(bits.numpy(), axis=1, bitorder='little'))
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, :, None] >> places) & 1).flatten(1)
