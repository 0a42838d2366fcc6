import torch

from mmdet_plugins.common import ranks


def test_normalisers_are_clamped_over_all_ranks_together(monkeypatch):
    """Two ranks with an IoU sum of 0.6 in all behave as one process that sees all of it."""
    assert ranks.mean_over_ranks(torch.tensor(0.6)).item() == 1
    assert ranks.mean_over_ranks(torch.tensor(3)).item() == 3
    monkeypatch.setattr(ranks, 'get_world_size', lambda: 2)
    monkeypatch.setattr(ranks, 'reduce_mean', lambda total: total / 2)
    assert ranks.mean_over_ranks(torch.tensor(0.6)).item() == 0.5
