"""Normalisers that make the mean of the ranks' losses that of the whole batch."""

from mmdet.utils import reduce_mean
from mmengine.dist import get_world_size
from torch import Tensor


def mean_over_ranks(total: Tensor) -> Tensor:
    """Mean over ranks of a normaliser, no less than 1 in the sum over ranks.

    A clamp of the mean, as in mmdet, would make the loss depend on the number of ranks that share
    a batch.
    """
    return reduce_mean(total.float()).clamp(min=1 / get_world_size())
