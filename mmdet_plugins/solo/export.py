"""SOLOv2 as one graph of plain operators, from pixels to instances.

Selection is exact and of the values of :class:`SOLOPostProcessor`: as many candidates get a mask as
the image of the batch with most scores above the threshold has.

Shapes: N images, ``H W`` their size, P cells of all levels, K classes, C candidates of an image,
n instances of an image (``max_per_img``), ``h w`` the mask map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdet_plugins.ops.instance_masks import mask_boxes
from mmdet_plugins.ops.matrix_nms import matrix_decay

from .head import SOLODynamicHead, flatten_grids
from .postprocess import grid_scores

OUTPUTS = ('boxes', 'scores', 'labels', 'masks', 'num_instances')


class ExportableSOLOv2(nn.Module):
    def __init__(self, detector, max_candidates: int | None = None) -> None:
        super().__init__()
        self.detector = detector.eval()
        self.max_candidates = max_candidates

    def forward(self, images: Tensor):
        pre, head = self.detector.data_preprocessor, self.detector.mask_head
        height, width = images.shape[-2:]
        x = images.float()
        if pre._channel_conversion:
            x = x.flip(1)
        x = (x - pre.mean) / pre.std
        d = pre.pad_size_divisor
        x = F.pad(x, (0, (width + d - 1) // d * d - width, 0, (height + d - 1) // d * d - height))
        outputs = head(self.detector.extract_feat(x))
        return select(head, outputs, x.shape[-2:], (height, width), self.max_candidates)


def select(head, outputs, padded_hw, image_hw, max_candidates):
    post = head.postprocess
    scores = grid_scores(outputs[0]).flatten(1)
    num = min(post.suppression['max_num'], scores.shape[1])
    least = scores.shape[1] if max_candidates is None else max(max_candidates, num)
    count = (scores > post.score_thr).sum(1).amax(0).clamp(num, least).item()
    torch._check(count >= num)
    torch._check(count <= scores.shape[1])
    flat = scores.topk(count).indices.sort().values  # of equal scores the first cell goes first
    cells, labels = flat // head.num_classes, flat % head.num_classes
    scores = scores.gather(1, flat)
    strides = torch.cat([
        torch.full((s * s,), t, device=flat.device) for s, t in zip(head.num_grids, head.strides)])
    kernels = flatten_grids(outputs[1])
    kernels = kernels.gather(1, cells[..., None].expand(-1, -1, kernels.shape[2]))
    feats = outputs[2][0]
    probs = (kernels @ feats.flatten(2)).sigmoid()
    masks = (probs > post.maps['mask_thr']).to(probs.dtype)
    areas = masks.sum(2)
    ok = (scores > post.score_thr) & (areas > strides[cells])
    if post.maskness:
        scores = scores * ((probs * masks).sum(2) / areas.clamp(min=1))
    scores = scores * ok
    # NMS
    scores, order = scores.sort(dim=1, descending=True)
    pre = torch.sym_min(count, post.suppression['nms_pre'])
    scores, order = scores[:, :pre], order[:, :pre]
    def take(x): return x.gather(1, order.view(*order.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))
    masks, probs, areas, labels = (take(x) for x in (masks, probs, areas, labels))
    inter = masks @ masks.transpose(1, 2)
    iou = inter / (areas[:, :, None] + areas[:, None] - inter).clamp(min=1)
    iou = iou * (labels[:, :, None] == labels[:, None])
    iou = iou * (scores > 0)[:, :, None]
    scores = scores * matrix_decay(iou, post.suppression['kernel'], post.suppression['sigma'])
    scores, order = scores.sort(dim=1, descending=True)
    scores, order = scores[:, :num], order[:, :num]
    probs, labels = (take(x) for x in (probs, labels))
    kept = (scores >= post.suppression['filter_thr']) & (scores > 0)
    full = F.interpolate(probs.unflatten(2, feats.shape[-2:]), padded_hw, mode='bilinear')
    masks = (full[..., :image_hw[0], :image_hw[1]] > post.maps['mask_thr']) & kept[..., None, None]
    return mask_boxes(masks), scores * kept, torch.where(kept, labels, -1), masks, kept.sum(1)
