"""DenseCL against the released step, written out; what a checkpoint keeps."""

import copy

import pytest
import torch
import torch.nn.functional as F
from mmdet.registry import METRICS, MODELS
from mmengine.optim import OptimWrapper
from mmengine.registry import init_default_scope
from mmengine.runner import load_state_dict

import mmdet_plugins.densecl  # noqa: F401

GRID, MOMENTUM, TEMPERATURE = 3, 0.9, 0.2


def build(**options) -> torch.nn.Module:
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(
        dict(
            type='DenseCL',
            data_preprocessor=dict(
                type='DenseCLDataPreprocessor', mean=[120.0, 110, 100], std=[50.0, 60, 70]
            ),
            backbone=dict(
                type='ResNet',
                depth=18,
                base_channels=8,
                stem_channels=8,
                num_stages=2,
                strides=(1, 2),
                dilations=(1, 1),
                out_indices=(1,),
                norm_eval=False,
                zero_init_residual=False,
            ),
            head=dict(
                type='DenseCLHead',
                in_channels=16,
                hidden_channels=16,
                out_channels=8,
                grid_size=GRID,
            ),
            queue_size=20,
            momentum=MOMENTUM,
            temperature=TEMPERATURE,
        )
        | options
    )
    model.init_weights()
    return model.train()


def batch(step: int, num: int = 6) -> dict:
    rng = torch.Generator().manual_seed(step)
    frames = torch.tensor([[0.0, 0.0, 40.0, 32.0], [36.0, 4.0, 6.0, 28.0]])
    return dict(
        inputs=torch.randint(0, 256, (num, 2, 3, 32, 40), dtype=torch.uint8, generator=rng),
        frames_xyxy=frames.repeat(num, 1, 1),
    )


def sgd(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-4)


class Released:
    """The released algorithm, image by image where that is clearer, on copies of the modules."""

    def __init__(self, model, dense_weight: float) -> None:
        self.weight = dense_weight
        self.query = copy.deepcopy(torch.nn.ModuleList([model.backbone, model.head]))
        self.key = copy.deepcopy(self.query)
        self.queue = model.queue.keys.t().clone()
        self.queue2 = model.dense_queue.keys.t().clone()
        self.pointer = 0
        self.optimizer = sgd(self.query.parameters())

    @staticmethod
    def encode(encoder, images):
        feat = encoder[0](images)[-1]
        head = encoder[1]
        single = F.normalize(head.global_mlp(F.adaptive_avg_pool2d(feat, 1).flatten(1)), dim=1)
        feat = F.adaptive_avg_pool2d(feat, GRID)
        dense = head.dense_mlp(feat)
        pooled = F.normalize(F.adaptive_avg_pool2d(dense, 1).flatten(1), dim=1)
        return (
            F.normalize(feat.flatten(2), dim=1),
            single,
            F.normalize(dense.flatten(2), dim=1),
            pooled,
        )

    def cross_entropy(self, positive, negative):
        logits = torch.cat([positive[:, None], negative], dim=1) / TEMPERATURE
        return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))

    def step(self, inputs) -> dict:
        mean, std = torch.tensor([120.0, 110, 100]), torch.tensor([50.0, 60, 70])
        images = (inputs.float() - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        feat_q, q, grid_q, _ = self.encode(self.query, images[:, 0])
        with torch.no_grad():
            for mine, other in zip(self.key.parameters(), self.query.parameters(), strict=True):
                mine.data = mine.data * MOMENTUM + other.data * (1 - MOMENTUM)
            feat_k, k, grid_k, pooled_k = self.encode(self.key, images[:, 1])
        single = self.cross_entropy((q * k).sum(1), q @ self.queue)
        dense = []
        for i in range(len(inputs)):
            for s in range(GRID * GRID):
                match = (feat_q[i, :, s] @ feat_k[i]).argmax()
                positive = grid_q[i, :, s] @ grid_k[i, :, match]
                negative = grid_q[i, :, s] @ self.queue2
                dense.append(self.cross_entropy(positive[None], negative[None]))
        losses = dict(
            loss_global=(1 - self.weight) * single,
            loss_dense=self.weight * torch.stack(dense).mean(),
        )
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        self.optimizer.step()
        for i in range(len(inputs)):
            self.queue[:, self.pointer] = k[i]
            self.queue2[:, self.pointer] = pooled_k[i]
            self.pointer = (self.pointer + 1) % self.queue.shape[1]
        return losses


def assert_state_equal(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize('dense_weight', [0.5, 0.9])
def test_four_steps_are_those_of_the_released_code(dense_weight):
    """Losses, weights after gradient steps, key encoder and queues, which run round once."""
    model = build(dense_weight=dense_weight)
    reference = Released(model, dense_weight)
    wrapper = OptimWrapper(sgd(model.parameters()))
    for step in range(4):
        theirs = reference.step(batch(step)['inputs'])
        ours = model.train_step(batch(step), wrapper)
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value.detach(), rtol=1e-5, atol=0)
    assert ours['queue_fill_global'] == ours['queue_fill_dense'] == 1
    assert_state_equal(model.backbone, reference.query[0])
    assert_state_equal(model.head, reference.query[1])
    assert_state_equal(model.key_encoder['backbone'], reference.key[0])
    assert_state_equal(model.key_encoder['head'], reference.key[1])
    torch.testing.assert_close(model.queue.keys, reference.queue.t(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.dense_queue.keys, reference.queue2.t(), rtol=1e-4, atol=1e-6)


def test_weight_zero_is_moco_and_skips_the_dense_branch(monkeypatch):
    model = build(dense_weight=0.0)
    reference = Released(model, 0.0)
    wrapper = OptimWrapper(sgd(model.parameters()))
    monkeypatch.setattr(type(model.head), 'forward_dense', None)
    untouched = model.dense_queue.keys.clone()
    for step in range(2):
        theirs = reference.step(batch(step)['inputs'])
        ours = model.train_step(batch(step), wrapper)
        torch.testing.assert_close(ours['loss'], theirs['loss_global'].detach(), rtol=1e-5, atol=0)
    assert_state_equal(model.backbone, reference.query[0])
    assert 'loss_dense' not in ours and torch.equal(model.dense_queue.keys, untouched)


def test_a_checkpoint_continues_exactly(tmp_path):
    model = build()
    optimizer = sgd(model.parameters())
    for step in range(2):
        model.train_step(batch(step), OptimWrapper(optimizer))
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / 'state.pth')
    resumed = build(queue_size=20)
    again = sgd(resumed.parameters())
    for part, state in zip([resumed, again], torch.load(tmp_path / 'state.pth'), strict=True):
        part.load_state_dict(state)
    for step in range(2, 5):
        ours = resumed.train_step(batch(step), OptimWrapper(again))
        theirs = model.train_step(batch(step), OptimWrapper(optimizer))
        assert ours == theirs
    for name, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_a_queue_of_another_size_begins_anew():
    model, small = build(), build(queue_size=12)
    model.train_step(batch(0), OptimWrapper(sgd(model.parameters())))
    before = small.dense_queue.keys.clone()
    load_state_dict(small, model.state_dict(), strict=True)
    assert torch.equal(small.dense_queue.keys, before) and small.dense_queue.written == 0
    assert_state_equal(small.backbone, model.backbone)
    assert model.dense_queue.written == 6


def test_other_matchings_and_negatives():
    one = batch(0)
    losses = {}
    for matching in ('backbone', 'dense', 'random'):
        model = build(matching=matching)
        torch.manual_seed(1)
        losses[matching] = model.train_step(one, OptimWrapper(sgd(model.parameters())))
    assert len({float(values['loss_dense']) for values in losses.values()}) == 3
    best = losses['dense']['similarity_dense']  # no other matching is as similar
    assert all(best >= values['similarity_dense'] for values in losses.values())
    assert len({float(values['agreement']) for values in losses.values()}) == 1

    model = build(negatives='sampled')
    with torch.no_grad():
        images = model.data_preprocessor(one, True)['inputs']
        key = copy.deepcopy(model)._encode_keys(images[1])
    model.train_step(one, OptimWrapper(sgd(model.parameters())))
    similarity = torch.einsum('ne,neyx->nyx', model.dense_queue.keys[:6], key.dense).flatten(1)
    torch.testing.assert_close(similarity.amax(1), torch.ones(6), rtol=0, atol=1e-5)


def test_agreement_is_counted_where_both_views_show_the_point():
    model = build()
    same = batch(0)
    same['inputs'][:, 1] = same['inputs'][:, 0]
    whole = torch.tensor([0.0, 0.0, 40.0, 32.0])
    losses = {}
    for name, frame in dict(same=whole, apart=whole + 100).items():
        same['frames_xyxy'] = torch.stack([whole, frame]).repeat(6, 1, 1)
        inputs = model.data_preprocessor(same, True)
        losses[name] = model(**inputs, mode='loss')['agreement'].item()
    assert losses == dict(same=1.0, apart=0.0)


def test_predictions_are_counted_per_image_over_its_pairs():
    """A view and itself, said to show the same, the mirror image, or another part of the image."""

    class Pixels(torch.nn.Module):
        def forward(self, images):
            return (images,)

    model = build().eval()
    model.backbone = Pixels()
    inputs = batch(0, 2)['inputs'].repeat(1, 2, 1, 1, 1)
    inputs[:, 1] = inputs[:, 2] = inputs[:, 3] = inputs[:, 0]
    whole, mirror, other = [0.0, 0.0, 40.0, 32.0], [40.0, 0.0, 0.0, 32.0], [40.0, 0.0, 80.0, 32.0]
    frames = torch.tensor([[whole, whole, whole, mirror], [whole, mirror, whole, other]])
    found = model.test_step(dict(inputs=inputs, frames_xyxy=frames))
    # A mirror keeps the middle column.
    alike = dict(shown=18, right=12, moved=6, right_moved=0, stayed=18, cells=9, pairs=2)
    half = alike | dict(shown=9, right=3)  # nothing of the other part
    assert found == [alike, half]
    inputs[1, 1] = inputs[1, 0].flip(2)
    found = model.test_step(dict(inputs=inputs, frames_xyxy=frames))
    assert found == [alike, half | dict(right=9, right_moved=6, stayed=12)]
    metric = METRICS.build(dict(type='DenseCLCorrespondence'))
    metric.process({}, found)
    assert metric.evaluate(2) == {
        'densecl/accuracy': 6 / 12,
        'densecl/accuracy_all': 21 / 27,
        'densecl/chance': 1 / 9,
        'densecl/times_chance': 4.5,
        'densecl/same_place': 30 / 36,
    }


@pytest.mark.parametrize('backbone', ['timm', 'mmdet'])
def test_any_backbone_and_every_parameter(backbone):
    options = {}
    if backbone == 'timm':
        import mmdet_plugins.common.timm_backbone  # noqa: F401

        options = dict(
            backbone=dict(type='TimmBackbone', model_name='resnet10t', out_indices=(1,)),
            head=dict(
                type='DenseCLHead', in_channels=64, hidden_channels=16, out_channels=8, grid_size=4
            ),
        )
    model = build(**options)
    inputs = model.data_preprocessor(batch(0), True)
    losses = model(**inputs, mode='loss')
    (losses['loss_global'] + losses['loss_dense']).backward()
    assert all(p.grad is not None for p in [*model.backbone.parameters(), *model.head.parameters()])
    assert not any(parameter.requires_grad for parameter in model.key_encoder.parameters())


def test_errors_are_sentences():
    with pytest.raises(
        ValueError, match="matching must be one of backbone, dense, random, not 'F'"
    ):
        build(matching='F')
    with pytest.raises(ValueError, match='between 0 and 1, not at 1.5'):
        build(dense_weight=1.5)
    model = build(queue_size=4)
    with pytest.raises(ValueError, match='queue of 4 keys cannot take the 6 of one batch'):
        model.train_step(batch(0), OptimWrapper(sgd(model.parameters())))
    with pytest.raises(ValueError, match="no mode 'guess'"):
        model(torch.zeros(1, 3, 32, 32), mode='guess')
    assert model(torch.zeros(1, 3, 32, 40))[-1].shape == (1, 16, 4, 5)
