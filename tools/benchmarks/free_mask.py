"""Free Mask of an image: features 2048 x 25 x 42 to masks of 480 x 640 as RLE, alone and in eights.

Features are non-negative and smooth: twelve objects, each of a sparse direction, on a ground of
their own and noise. Both sides give encodings, scores, boxes and embeddings of 128 numbers; the
priors of the released code are on. The peer is that code's algorithm as it is described: one
product a query scale, Matrix NMS of all masks, the best 20 measured at full size, pycocotools. If
the environment variable PEER_FREESOLO names a checkout of NVlabs/FreeSOLO, the peer is its script
itself, from the features on.
"""

import ast
import importlib.util
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from _case import Case, Floor, Sides
from pycocotools import mask as coco_mask
from torch import Tensor

from mmdet_plugins.ops.free_mask import FreeMasks, free_masks
from mmdet_plugins.ops.rle import decode_rle

CHANNELS, MAP_HW, IMAGE_HW = 2048, (25, 42), (480, 640)
OPTIONS = dict(min_centre=0.2, max_width=0.95, embedding_dim=128)


def _features(num: int, device: str) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    y, x = (torch.arange(length).float()[:, None] for length in MAP_HW)
    images = []
    for _ in range(num):
        centre = torch.rand(12, 2, generator=rng) * torch.tensor(MAP_HW)
        radius = 1.5 + 4 * torch.rand(12, 2, generator=rng)
        weight = [
            torch.exp(-(((axis - centre[:, i]) / radius[:, i]) ** 2))
            for i, axis in enumerate((y, x))
        ]
        directions = torch.rand(CHANNELS, 12, generator=rng) ** 6
        noise = F.avg_pool2d(
            torch.randn(1, CHANNELS, *MAP_HW, generator=rng), 3, 1, 1, count_include_pad=False
        )
        ground = 0.3 * torch.rand(CHANNELS, 1, 1, generator=rng) ** 4
        objects = torch.einsum('ck,yk,xk->cyx', directions, *weight)
        images.append((ground + objects + 0.1 * noise[0]).relu())
    return torch.stack(images).to(device)


def _released(features: Tensor) -> list[tuple]:
    """Encoding, score, box and embedding of each mask, as the released code comes to them."""
    channels, map_height, map_width = features.shape
    height, width = IMAGE_HW
    queries = [
        F.interpolate(features[None], scale_factor=scale, mode='bilinear')[0].flatten(1).T
        for scale in (1.0, 0.5, 0.25)
    ]
    queries = F.normalize(torch.cat(queries), dim=1)
    soft = queries @ F.normalize(features.flatten(1), dim=0)
    soft = soft - soft.min(1, keepdim=True).values
    soft = (soft / soft.max(1, keepdim=True).values).unflatten(1, (map_height, map_width))
    masks = soft >= 0.5
    embeddings = F.interpolate(queries[None], 128, mode='linear')[0]

    keep = masks.sum((1, 2)) > 1
    if not keep.any():
        return []
    soft, masks, embeddings = soft[keep], masks[keep], embeddings[keep]
    area = masks.sum((1, 2))
    maskness = (soft * masks.float()).sum((1, 2)) / area
    maskness, order = maskness.sort(descending=True)
    soft, masks, embeddings, area = soft[order], masks[order], embeddings[order], area[order]
    flat = masks.flatten(1).float()
    inter = flat @ flat.T
    iou = (inter / (area[:, None] + area - inter)).triu(1)
    compensation = torch.exp(-2 * iou.max(0).values[:, None].expand_as(iou) ** 2)
    scores = maskness * (torch.exp(-2 * iou**2) / compensation).min(0).values
    scores, order = scores.sort(descending=True)
    scores, order = scores[:20], order[:20]

    full = F.interpolate(soft[order][None], IMAGE_HW, mode='bilinear')[0]
    masks, embeddings = (full >= 0.5).float(), embeddings[order]
    columns, rows = masks.max(1).values, masks.max(2).values
    box_hw = torch.stack([rows.sum(1), columns.sum(1)], 1)
    centre = [
        (hit * torch.arange(hit.shape[1], device=hit.device)).sum(1) / hit.sum(1)
        for hit in (rows, columns)
    ]
    centre = torch.stack(centre, 1)
    boxes = torch.cat([centre - 0.5 * box_hw, centre + 0.5 * box_hw], 1)
    keep = (centre[:, 0] > 0.2 * height) & (box_hw[:, 1] < 0.95 * width) & (scores >= 0.7)
    masks, scores = masks[keep].cpu().numpy(), scores[keep].cpu().numpy()
    boxes, embeddings = boxes[keep].cpu().numpy(), embeddings[keep].cpu().numpy()
    rles = [coco_mask.encode(np.asfortranarray(mask, np.uint8)) for mask in masks]
    return list(zip(rles, scores, boxes, embeddings, strict=True))


def _script(checkout: Path) -> Callable[[Tensor], list[tuple]]:
    """The loop body of the released script, from the features of an image on."""
    spec = importlib.util.spec_from_file_location(
        'peer_freesolo_utils', checkout / 'freesolo/modeling/solov2/utils.py'
    )
    utils = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(utils)
    tree = ast.parse((checkout / 'demo/inference_freemask.py').read_text(encoding='utf-8'))
    (loop,) = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.For) and 'predictions' in ast.unparse(node)
    ]
    first = next(i for i, step in enumerate(loop.body) if ast.unparse(step).startswith('keys = '))
    once = ast.parse('for _ in (0,): pass').body[0]
    once.body = loop.body[first:]
    code = compile(ast.Module([once], []), 'inference_freemask.py', 'exec')

    def run(features: Tensor) -> list[tuple]:
        scope = dict(torch=torch, F=F, np=np, mask_util=coco_mask, img_path='1.jpg', ann_id=0)
        scope |= dict(matrix_nms=utils.matrix_nms, center_of_mass=utils.center_of_mass)
        scope |= dict(predictions=dict(res5=features[None]), images_list=[], anns_list=[])
        scope |= dict(zip(('height', 'width'), IMAGE_HW, strict=True))
        exec(code, scope)
        keys = 'segmentation', 'score', 'bbox', 'emb'
        return [tuple(found[key] for key in keys) for found in scope['anns_list']]

    return run


def _parity(ours: list[FreeMasks], peer: list[list[tuple]]) -> str:
    differing = count = 0
    for mine, theirs in zip(ours, peer, strict=True):
        assert len(mine.rles) == len(theirs), f'{len(mine.rles)} masks, the peer {len(theirs)}'
        theirs = sorted(theirs, key=lambda found: -found[1])
        scores = torch.tensor([float(found[1]) for found in theirs])
        torch.testing.assert_close(mine.scores, scores, rtol=1e-4, atol=0)
        masks = decode_rle(mine.rles, IMAGE_HW)
        for rle, score, _, embedding in theirs:
            # The same one, where scores are as good as equal.
            near = [i for i, mine_score in enumerate(mine.scores) if abs(mine_score - score) < 1e-4]
            wrong = (masks[near] != coco_mask.decode(rle).astype(bool)).sum((1, 2))
            best = near[wrong.argmin()]
            assert wrong.min() <= 20, f'{wrong.min()} pixels differ'
            embedding = torch.as_tensor(embedding, dtype=torch.float32)
            torch.testing.assert_close(mine.embeddings[best], embedding, rtol=1e-3, atol=1e-5)
            differing, count = differing + int(wrong.min()), count + 1
    return f'{count} masks, scores to 1e-4; {differing} pixels differ in all'


def _build(num: int, device: str) -> Sides:
    features = _features(num, device)
    checkout = os.environ.get('PEER_FREESOLO')
    peer = _script(Path(checkout)) if checkout else _released
    return Sides(
        lambda: free_masks(features, IMAGE_HW, **OPTIONS),
        lambda: [peer(image) for image in features],
        _parity,
    )


CASES = [
    Case('one image', partial(_build, 1), {'cpu': Floor(3), 'cuda': Floor(15)}),
    Case('eight images', partial(_build, 8), {'cpu': Floor(3), 'cuda': Floor(15)}),
]
