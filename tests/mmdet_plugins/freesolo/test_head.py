"""The head's losses against their equations written out, and its predictions."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from mmdet.models.dense_heads.boxinst_head import BoxInstMaskHead

from mmdet_plugins.common.location_head import flatten_grids
from mmdet_plugins.ops.grid_targets import GridTargets

BITS_OF_UNFOLD = (7, 6, 5, 4, 0, 1, 2, 3)


def dice(a, b):
    return 1 - 2 * (a * b).sum(-1) / ((a**2).sum(-1) + (b**2).sum(-1) + 1e-5)


def literal_losses(head, x, samples) -> dict:
    """Equations 6.4 to 6.8, one positive cell after the other."""
    cls_logits, kernel_feats, (features,), cls_feats = head(x)
    targets = head.get_targets(
        (cls_logits, kernel_feats, [features]), [s.gt_instances for s in samples]
    )
    positives, _ = targets.by_image()
    cells = list(zip(*(part.tolist() for part in positives), strict=True))
    flat_kernels = flatten_grids([head.conv_kernel(grid) for grid in kernel_feats])
    embedded = flatten_grids([head.conv_embed(feat) for feat in cls_feats])
    wanted = torch.cat([s.gt_instances.embeddings for s in samples])
    totals = dict.fromkeys(('max', 'avg', 'pairwise', 'pairs', 'embed'), 0)
    for image, cell, index in cells:
        logits = torch.einsum('c,chw->hw', flat_kernels[image, cell], features[image])
        p, t = logits.sigmoid(), targets.masks[0][index].float()
        for axis in (0, 1):
            totals['max'] += dice(p.max(axis)[0], t.max(axis)[0])
            totals['avg'] += dice(p.mean(axis), t.mean(axis))
        ys, xs = t.nonzero(as_tuple=True)
        box = torch.zeros_like(t)
        if len(ys):
            box[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1] = 1
        bits = samples[image].affinity
        weights = torch.stack([bits >> bit & 1 for bit in BITS_OF_UNFOLD]) * box
        settings = SimpleNamespace(pairwise_size=3, pairwise_dilation=2)
        terms = BoxInstMaskHead.get_pairwise_affinity(settings, logits[None])[0]
        totals['pairwise'] += (terms * weights).sum()
        totals['pairs'] += weights.sum()
        q, other = embedded[image, cell], wanted[index]
        totals['embed'] += 1 - q @ other / (q.norm() * other.norm())
    num = targets.num_positives
    return dict(
        loss_max_proj=totals['max'] / num,
        loss_avg_proj=0.1 * totals['avg'] / num,
        loss_pairwise=0.25 * totals['pairwise'] / totals['pairs'],  # the first of four steps
        loss_embed=4 * totals['embed'] / len(cells),
    )


def test_losses_are_the_equations(freesolo, samples):
    head, x = freesolo.build_head(), freesolo.pyramid()
    expected = literal_losses(head, x, samples)
    losses = head.loss(x, samples)
    assert losses.keys() == {*expected, 'loss_cls'}
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-4, atol=1e-6)
    found = torch.autograd.grad(sum(losses[name] for name in expected), head.conv_kernel.weight)
    wanted = torch.autograd.grad(sum(expected.values()), head.conv_kernel.weight)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * wanted[0].abs().max())


@pytest.mark.parametrize('counts', [(5, 3), (0, 4), (0, 0)])
def test_every_parameter_gets_a_gradient(freesolo, counts):
    head, x = freesolo.build_head(), freesolo.pyramid()
    samples = [freesolo.sample(count, seed=i) for i, count in enumerate(counts)]
    losses = head.loss(x, samples)
    sum(losses.values()).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        silent = not any(counts) and not name.startswith(('cls_convs', 'conv_cls'))
        assert parameter.grad.any() != silent, name
    if not any(counts):
        assert losses['loss_max_proj'] == losses['loss_pairwise'] == losses['loss_embed'] == 0


def test_full_masks_are_solov2s(freesolo, samples):
    """Table 6.7(e): with Dice and without embeddings nothing is left of FreeSOLO but its class."""
    changes = dict(embed_dims=None, loss_mask=dict(type='SOLODiceLoss'))
    head, x = freesolo.build_head(**changes), freesolo.pyramid()
    stock = freesolo.build_head(type='SOLODynamicHead', num_classes=1, **changes)
    stock.load_state_dict(head.state_dict())
    expected, found = stock.loss(x, samples), head.loss(x, samples)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_claims_are_read_back_once_a_step(freesolo, samples, monkeypatch):
    """Each time, the host waits for the device."""
    calls, by_image = [], GridTargets.by_image
    monkeypatch.setattr(GridTargets, 'by_image', lambda self: calls.append(self) or by_image(self))
    assert 'loss_embed' in freesolo.build_head().loss(freesolo.pyramid(), samples)
    assert len(calls) == 1


def test_images_without_masks_train_classes_only(freesolo, samples):
    changes = dict(embed_dims=None, num_classes=3, loss_mask=dict(type='SOLODiceLoss'))
    head, x = freesolo.build_head(**changes), freesolo.pyramid()
    both = head.loss(x, samples)
    samples[1].set_metainfo(dict(has_masks=False))
    limited = head.loss(x, samples)
    alone = head.loss([feat[:1] for feat in x], samples[:1])
    torch.testing.assert_close(limited['loss_mask'], alone['loss_mask'])
    torch.testing.assert_close(limited['loss_cls'], both['loss_cls'])
    assert not torch.isclose(limited['loss_mask'], both['loss_mask'])
    samples[0].set_metainfo(dict(has_masks=False))
    assert head.loss(x, samples)['loss_mask'] == 0


def test_two_ranks_lose_as_much_as_one(freesolo, samples, monkeypatch):
    """Each sees an image of the two; what they divide by is the mean of both."""
    modules = ('mmdet_plugins.common.ranks', 'mmdet_plugins.common.location_head')

    def patch(reduce_mean, world_size):
        for module in modules:
            monkeypatch.setattr(f'{module}.reduce_mean', reduce_mean)
            monkeypatch.setattr(f'{module}.get_world_size', lambda: world_size)

    def losses_of(images):
        head = freesolo.build_head()
        x = [feat[images] for feat in freesolo.pyramid()]
        return head.loss(x, samples[images])

    counts = []

    def note(total):
        counts[-1].append(total)
        return total

    parts = [slice(0, 1), slice(1, 2)]
    patch(note, 1)
    for part in parts:
        counts.append([])
        losses_of(part)
    means = [(a + b) / 2 for a, b in zip(*counts, strict=True)]
    assert len(means) == 4
    found = []
    for part in parts:
        left = iter(means)
        patch(lambda total, left=left: next(left), 2)
        found.append(losses_of(part))
    patch(lambda total: total, 1)
    for name, value in losses_of(slice(0, 2)).items():
        torch.testing.assert_close((found[0][name] + found[1][name]) / 2, value)


def test_warm_up_goes_on_after_a_resume(freesolo, samples):
    head, x = freesolo.build_head(), freesolo.pyramid()
    values = [head.loss(x, samples)['loss_pairwise'].item() for _ in range(3)]
    other = freesolo.build_head()
    other.load_state_dict(head.state_dict())
    values += [other.loss(x, samples)['loss_pairwise'].item() for _ in range(2)]
    full = values[-1]
    assert values == pytest.approx([full / 4, full / 2, full * 3 / 4, full, full])
    other.eval()
    other.loss(x, samples)
    assert other.loss_mask.steps == 5


def test_embeddings_are_the_convolutions(freesolo):
    head, x = freesolo.build_head(), freesolo.pyramid()
    feats = head(x)[3]
    dense = flatten_grids([head.conv_embed(feat) for feat in feats])
    images, cells = (dense[..., 0] < 1e9).nonzero(as_tuple=True)
    torch.testing.assert_close(head.embeddings(feats, images, cells), dense[images, cells])


def test_embeddings_are_learnt(freesolo, samples):
    head, x = freesolo.build_head(), freesolo.pyramid()
    optimizer = torch.optim.Adam(head.conv_embed.parameters(), lr=0.05)
    first = None
    for _ in range(40):
        loss = head.loss(x, samples)['loss_embed']
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert 0 <= loss.item() < 0.3 * first


def test_bfloat16_is_finite(freesolo, samples):
    head, x = freesolo.build_head(), freesolo.pyramid()
    expected = head.loss(x, samples)
    head.loss_mask.steps.zero_()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses = head.loss(x, samples)
    sum(losses.values()).backward()
    for name, value in losses.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name], rtol=0.1, atol=0.05)
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


def test_predictions_carry_embeddings(freesolo, samples):
    head, x = freesolo.build_head().eval(), freesolo.pyramid()
    with torch.no_grad():
        head.conv_cls.bias.fill_(0.0)
        results = head.predict(x, samples, rescale=True)
        feats = head(x)[3]
    dense = F.normalize(flatten_grids([head.conv_embed(feat) for feat in feats]), dim=2)
    assert sum(map(len, results)) > 3
    for image, found in enumerate(results):
        torch.testing.assert_close(found.embeddings, dense[image, found.cells])
        assert all(rle['size'] == [*samples[image].ori_shape] for rle in found.masks)
    bare = freesolo.build_head(embed_dims=None).eval()
    assert 'embeddings' not in bare.predict(x, samples)[0]


def test_what_is_missing_is_named(freesolo, samples):
    head, x = freesolo.build_head(), freesolo.pyramid()
    with pytest.raises(ValueError, match=r'embed_dims=6 \(it is 4\)'):
        freesolo.build_head(embed_dims=4).loss(x, samples)
    del samples[1].gt_instances.embeddings
    with pytest.raises(KeyError, match='image 1 of the batch comes without embeddings'):
        head.loss(x, samples)
    del samples[0].affinity
    with pytest.raises(KeyError, match='FreeSOLODataPreprocessor'):
        head.loss(x, samples)
