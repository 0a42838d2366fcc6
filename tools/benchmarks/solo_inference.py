"""Inference of SOLOv2, R50, batch 1, 480 x 640 (CUDA: 800 x 1333), 500 candidates, to COCO RLE.

From an image in host memory through preprocessing, network and post-processing. The models are
those of ``solo_train_step``, the weights of their last class convolution ten times as large, as in
a fresh network all scores are alike. The score threshold lies between the 500th and the 501st
score. mmdet's masks go through its ``encode_mask_results``. On CUDA, parity is found without TF32
and time is taken with it, as convolutions run by default.
"""

import torch
from _case import Case, Floor, Sides
from mmdet.structures.mask import encode_mask_results
from mmengine.structures import InstanceData
from solo_train_step import build_batch, build_pair, exactly

from mmdet_plugins.common.mask_postprocess import grid_scores
from mmdet_plugins.ops.rle import decode_rle

CANDIDATES = 500


def _compare(mine: InstanceData, theirs: tuple[InstanceData, list[dict]]) -> str:
    theirs, rles = theirs
    assert torch.equal(mine.labels, theirs.labels), 'labels differ'
    torch.testing.assert_close(mine.scores, theirs.scores, rtol=1e-5, atol=0)
    masks = decode_rle(mine.masks)
    differ = int((masks != decode_rle(rles)).sum())
    assert differ <= 1e-5 * masks.size, f'{differ} of {masks.size} pixels differ'
    return f'{len(masks)} instances, scores to 1e-5, {differ} of {masks.size} pixels differ'


@torch.no_grad()
def _build(device: str) -> Sides:
    model, stock, _ = build_pair(device)
    batch = build_batch(device)
    for one in (model, stock):
        one.eval().mask_head.conv_cls.weight *= 10
    image = model.data_preprocessor(batch)['inputs']
    scores = grid_scores(model.mask_head(model.extract_feat(image))[0])
    threshold = scores.flatten().topk(CANDIDATES + 1).values[-2:].mean().item()
    model.mask_head.postprocess.score_thr = stock.mask_head.test_cfg.score_thr = threshold

    @torch.no_grad()
    def ours() -> InstanceData:
        return model.test_step(batch)[0].pred_instances

    @torch.no_grad()
    def peer() -> tuple[InstanceData, list[dict]]:
        found = stock.test_step(batch)[0].pred_instances
        return found, encode_mask_results(found.masks.cpu().numpy())

    return Sides(ours, peer, lambda *_: _compare(exactly(ours), exactly(peer)))


FLOORS = {'cpu': Floor(ratio=1.3), 'cuda': Floor(ratio=1.5)}
CASES = [Case('SOLOv2 R50, one image', _build, FLOORS)]
