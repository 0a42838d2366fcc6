"""Segment the object in a box: second stage of the UVO 2021 winner (Du et al., sections 1.2, 3.2).

A crop around one instance, 20 pixels of margin on all sides, goes to 512x512 whatever its shape; a
two-class UperNet tells the object from everything else. Reference code: dulucas/UVO_Challenge,
whose hyper-parameters are kept; mmseg's ``EncoderDecoder``, ``UPerHead`` and transforms are stock.

Deviations:

* instances are cut out of COCO-style JSON while training, not exported as mask files beforehand;
* the box jitter, whose code was not released, moves each side on its own
  (:class:`BoxCropFromMask`);
* the released pipelines also shift the gamma (``RandomGamma``), which the paper does not name;
* inference resamples the network's logits to the crop in one step instead of two (to 512x512, then
  to the crop), and adds the logits of the flipped crop instead of its probabilities: for two
  classes both sums have the same sign.
"""

from .dataset import BoxCropDataset
from .sampler import BoxCropMixSampler
from .transforms import BoxCropFromMask, BoxCropLoadMask

__all__ = [
    'BoxCropDataset',
    'BoxCropFromMask',
    'BoxCropLoadMask',
    'BoxCropMixSampler',
    'BoxSegmenter',
]


def __getattr__(name: str):
    # Training needs nothing of the inference module; importing it here would slow every worker.
    if name == 'BoxSegmenter':
        from .inference import BoxSegmenter

        return BoxSegmenter
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
