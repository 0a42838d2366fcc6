import math

import pytest
import torch
import torch.nn.functional as F

from mmdet_plugins.ops import contrastive
from mmdet_plugins.ops.contrastive import info_nce, match_cells, mutual_matches, true_cells


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=1)


def plain(query, key, queue, temperature):
    """Positive and negative logits in one tensor, then cross entropy with class 0."""
    positive = (query * key).sum(1, keepdim=True)
    logits = torch.cat([positive, query @ queue.t()], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long), reduction='none')


def both(query, key, queue, temperature, weight):
    """Loss and gradients of ours and of the plain one."""
    found = []
    for function in (info_nce, plain):
        leaves = [query.clone().requires_grad_(), key.clone().requires_grad_()]
        loss = function(*leaves, queue, temperature)
        (loss * weight).sum().backward()
        found.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    return found


def test_value_by_hand():
    query = torch.tensor([[1.0, 0.0]], requires_grad=True)
    key, queue = torch.tensor([[0.6, 0.8]]), torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    loss = info_nce(query, key, queue, 0.5)
    total = math.exp(1.2) + 1 + math.exp(-2)
    assert loss.item() == pytest.approx(math.log(total) - 1.2, abs=1e-6)
    loss.sum().backward()
    by_x = (0.6 * math.exp(1.2) - math.exp(-2)) / total - 0.6
    by_y = (0.8 * math.exp(1.2) + 1) / total - 0.8
    torch.testing.assert_close(query.grad, torch.tensor([[by_x, by_y]]) / 0.5, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('temperature', [0.2, 0.07, 0.002])
@pytest.mark.parametrize(('queries', 'negatives'), [(1, 1), (7, 64), (33, 100), (50, 300)])
def test_equals_the_plain_loss(queries, negatives, temperature, monkeypatch):
    monkeypatch.setattr(contrastive, '_LOGITS', 1)  # tiles of 64
    weight = torch.rand(queries, generator=torch.Generator().manual_seed(3))
    ours, theirs = both(
        unit(queries, 12),
        unit(queries, 12, seed=1),
        unit(negatives, 12, seed=2),
        temperature,
        weight,
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 / temperature)


def test_vectors_of_any_length_do_not_overflow(monkeypatch):
    monkeypatch.setattr(contrastive, '_LOGITS', 1)
    query, key, queue = 30 * unit(5, 8), 30 * unit(5, 8, seed=1), 30 * unit(96, 8, seed=2)
    ours, theirs = both(query, key, queue, 0.2, torch.ones(5))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-3)


def test_a_key_without_gradient_and_no_gradient_at_all():
    query, key, queue = unit(4, 8).requires_grad_(), unit(4, 8, seed=1), unit(32, 8, seed=2)
    info_nce(query, key, queue, 0.2).sum().backward()
    expected = query.grad.clone()
    with torch.no_grad():
        loss = info_nce(query, key, queue, 0.2)
    query.grad = None
    plain(query, key, queue, 0.2).sum().backward()
    torch.testing.assert_close(expected, query.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss, plain(query, key, queue, 0.2).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_short_factors_are_summed_in_float32(dtype):
    query, key, queue = unit(40, 128), unit(40, 128, seed=1), unit(5000, 128, seed=2)
    exact = info_nce(query, key, queue, 0.2)
    short = info_nce(query, key, queue, 0.2, dtype=dtype)
    assert short.dtype == torch.float32
    torch.testing.assert_close(short, exact, rtol=1e-4, atol=0)
    low = query.to(dtype).requires_grad_()
    info_nce(low, key, queue, 0.2).sum().backward()
    assert low.grad.dtype == dtype


def test_autocast_changes_nothing():
    query, key, queue = unit(40, 16), unit(40, 16, seed=1), unit(500, 16, seed=2)
    with torch.autocast('cpu', torch.bfloat16):
        inside = info_nce(query, key, queue, 0.2)
    assert torch.equal(inside, info_nce(query, key, queue, 0.2))


def test_nothing_of_the_size_of_the_logits_is_kept():
    query, key, queue = unit(64, 16).requires_grad_(), unit(64, 16, seed=1), unit(9000, 16, seed=2)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
    ):
        info_nce(query, key, queue, 0.2)
    assert sum(kept) <= 2 * query.numel() + len(query)


def test_matches_are_those_of_the_cosine():
    query, key = torch.randn(2, 5, 3, 3), torch.randn(2, 5, 3, 3)
    key[0, :, 1, 2] *= 100  # a long vector is not a similar one
    found = match_cells(query, key)
    for image in range(2):
        for cell in range(9):
            vector = query[image].flatten(1)[:, cell]
            cosine = F.cosine_similarity(vector[:, None], key[image].flatten(1), dim=0)
            assert found[image, cell] == cosine.argmax()


def test_true_cells_of_a_shifted_and_a_flipped_view():
    whole = torch.tensor([[0.0, 0.0, 120.0, 60.0]])
    same = true_cells(whole, whole, 3)
    assert same.tolist() == [list(range(9))]
    mirrored = true_cells(whole, torch.tensor([[120.0, 0.0, 0.0, 60.0]]), 3)
    assert mirrored.tolist() == [[2, 1, 0, 5, 4, 3, 8, 7, 6]]
    # the second view shows x from 40 to 160 and y from -20 to 40: a cell to the right, one up
    shifted = true_cells(whole, torch.tensor([[40.0, -20.0, 160.0, 40.0]]), 3)
    assert shifted.tolist() == [[-1, 3, 4, -1, 6, 7, -1, -1, -1]]


def test_mutual_matches_by_hand():
    """Cells at angles of 0, 60, 90, 180 degrees and 10, 50, 80, 20."""
    query, key = (
        torch.deg2rad(torch.tensor(angles)).view(1, 1, 2, 2)
        for angles in ([0.0, 60, 90, 180], [10.0, 50, 80, 20])
    )
    query, key = (torch.cat([3 * part.cos(), 3 * part.sin()], 1) for part in (query, key))
    mutual, similarity = mutual_matches(query, 2 * key)
    assert mutual.tolist() == [[0, 1, 2, -1]]  # 180 is nearest to 80, which is nearest to 90
    expected = torch.deg2rad(torch.tensor([[10.0, 10, 10, 100]])).cos()
    torch.testing.assert_close(similarity, expected)
