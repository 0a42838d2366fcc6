"""100 and 1000 boxes (sides log-uniform, 16 to 512 px) of a 720p JPEG in memory, network stubbed.

Ours is ``BoxSegmenter``. The peer goes box by box, as the challenge entry and mmseg's stock
whole-image inference do: decode, crop, ``cv2.resize`` to 512x512, network, logits to 512x512 and
then to the crop, softmax, argmax, paste into a frame, encode with pycocotools. One forward pass a
box in the first two cases; in the last the flipped crop too, prepared and post-processed like the
other. The stub stands for the whole segmentor, with the normalisation that mmseg puts at its head:
on both sides it takes uint8 crops on the device, and gives 128x128 logits of two classes, drawn
from 16x16 pixels of the green channel: it must cost next to nothing beside what is measured.
"""

import cv2
import mmcv
import numpy as np
import torch
import torch.nn.functional as F
from _case import Case, Floor, Sides
from pycocotools import mask as coco_mask
from torch import nn

from mmdet_plugins.ops.crops import expand_boxes
from mmdet_plugins.ops.rle import decode_rle
from mmseg_plugins.box_crop import BoxSegmenter

_HW = (720, 1280)
_MARGIN_PX = 20


class _Stub(nn.Module):
    """Calls bright pixels the object."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        bright = inputs[:, 1:2, 16::32, 16::32].float() / 58 - 2
        return F.interpolate(torch.cat((-bright, bright), dim=1), (128, 128))


def _scene(rng: np.random.Generator) -> bytes:
    """Bright objects on a dark, textured ground, as the bytes of a JPEG file."""
    frame = rng.normal(size=(*_HW, 3)).astype(np.float32)
    frame = 10 * cv2.GaussianBlur(frame, (0, 0), 1.0)
    blobs = cv2.GaussianBlur(rng.normal(size=_HW).astype(np.float32), (0, 0), 30)
    frame += (116 + 90 * np.tanh(12 * blobs / blobs.std()))[..., None]
    return cv2.imencode('.jpg', frame.clip(0, 255).astype(np.uint8))[1].tobytes()


def _boxes(rng: np.random.Generator, number: int) -> np.ndarray:
    wh = np.exp(rng.uniform(np.log(16), np.log(512), size=(number, 2))).round().astype(int)
    xy = rng.integers(0, np.array(_HW[::-1]) - wh)
    return np.concatenate((xy, xy + wh), axis=1)


def _box_by_box(
    network: nn.Module, data: bytes, boxes: np.ndarray, flip: bool, device: str
) -> list[dict]:
    rles = []
    for box in boxes:
        frame = mmcv.imfrombytes(data)
        x1, y1, x2, y2 = expand_boxes(box, _MARGIN_PX, frame.shape[:2])[0]
        crop = cv2.resize(frame[y1:y2, x1:x2], (512, 512), interpolation=cv2.INTER_LINEAR)
        probability = 0
        for mirrored in (False, True)[: 1 + flip]:
            view = mmcv.imflip(crop) if mirrored else crop
            inputs = torch.from_numpy(np.ascontiguousarray(view.transpose(2, 0, 1)))[None]
            logits = F.interpolate(network(inputs.to(device)), (512, 512), mode='bilinear')
            logits = F.interpolate(logits, (int(y2 - y1), int(x2 - x1)), mode='bilinear')
            view = logits.softmax(1)
            probability = probability + (view.flip(3) if mirrored else view)
        mask = np.zeros(frame.shape[:2], dtype=np.uint8)
        mask[y1:y2, x1:x2] = probability.argmax(1)[0].cpu().numpy()
        rle = coco_mask.encode(np.array(mask[:, :, None], order='F', dtype=np.uint8))[0]
        rle['counts'] = rle['counts'].decode()
        rles.append(rle)
    return rles


def _same_masks(ours: list[dict], peer: list[dict]) -> str:
    assert len(ours) == len(peer)
    ious = []
    for one, other in zip(ours, peer, strict=True):
        a, b = decode_rle([one, other])
        ious.append((a & b).sum() / max((a | b).sum(), 1) if (a | b).any() else 1.0)
    mean, least = float(np.mean(ious)), float(np.min(ious))
    assert mean >= 0.999, f'mean mask IoU {mean:.5f} < 0.999'
    return f'mean mask IoU {mean:.5f} over {len(ious)} boxes, least {least:.4f}'


def _case(number: int, flip: bool, floor: float | None) -> Case:
    def build(device: str) -> Sides:
        rng = np.random.default_rng(0)
        data, boxes = _scene(rng), _boxes(rng, number)
        network = _Stub().to(device).eval()
        segmenter = BoxSegmenter(network, device=device, flip=flip, margin_px=_MARGIN_PX)

        @torch.inference_mode()
        def peer() -> list[dict]:
            return _box_by_box(network, data, boxes, flip, device)

        return Sides(ours=lambda: segmenter(data, boxes), peer=peer, parity=_same_masks)

    floors = dict(cpu=Floor(ratio=floor), cuda=Floor(ratio=floor))
    return Case(f'{number} boxes' + ', with flip' * flip, build, floors)


CASES = [_case(100, False, 15.0), _case(1000, False, 50.0), _case(1000, True, None)]
