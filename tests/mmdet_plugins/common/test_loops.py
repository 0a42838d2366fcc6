from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmdet.datasets.samplers import AspectRatioBatchSampler
from mmengine.registry import DATA_SAMPLERS
from mmengine.runner import IterBasedTrainLoop, Runner
from torch.utils.data import DataLoader, IterableDataset

from mmdet_plugins.common.loops import ResumableIterBasedTrainLoop

ITERS = 14
BATCH = 3


class Recorder:
    """The part of a runner that a training loop talks to; keeps the samples it is trained on."""

    def __init__(self) -> None:
        self.samples = []
        self.model = self
        self.optim_wrapper = self.val_loop = None
        self.visualizer = SimpleNamespace()

    def call_hook(self, *args, **kwargs) -> None: ...

    def train(self) -> None: ...

    def train_step(self, batch: dict, optim_wrapper) -> None:
        self.samples.append(list(batch['index']) if isinstance(batch, dict) else batch.tolist())


def build_loader(
    tiny_run, fetched: Path, sampler: str, workers: int, by_aspect: bool = False
) -> DataLoader:
    fetched.touch()
    options = dict(batch_sampler=dict(type='AspectRatioBatchSampler')) if by_aspect else {}
    return Runner.build_dataloader(
        dict(
            batch_size=BATCH,
            num_workers=workers,
            persistent_workers=workers > 0,
            sampler=dict(type=sampler, shuffle=True, seed=5),
            dataset=dict(type='TinyDataset', fetched=str(fetched)),
            **options,
        )
    )


def train(loop_type: type, loader: DataLoader, begin: int = 0) -> list[list[int]]:
    """Train on ``loader`` from iteration ``begin`` on; return the samples of each batch."""
    recorder = Recorder()
    loop = loop_type(recorder, loader, ITERS)
    loop._iter = begin  # as Runner.resume does
    loop.run()
    assert loop.iter == ITERS
    if loader.num_workers:  # what garbage collection would wait seconds for
        loader._iterator._shutdown_workers()
    return recorder.samples


@pytest.fixture(autouse=True, scope='module')
def _setup(tiny_run):
    # mmdet registers it for its own scope, which these loaders do not enter
    DATA_SAMPLERS.register_module(module=AspectRatioBatchSampler)
    yield
    DATA_SAMPLERS._module_dict.pop('AspectRatioBatchSampler')


@pytest.fixture
def no_pause(monkeypatch):
    """The stock loop sleeps for 2 s between epochs."""
    monkeypatch.setattr('mmengine.runner.loops.time.sleep', lambda _: None)


@pytest.mark.parametrize('begin', [0, 3, 4, 11])  # an epoch has 4 batches
@pytest.mark.parametrize(
    ('sampler', 'by_aspect'),
    [('InfiniteSampler', False), ('DefaultSampler', False)]
    + [('InfiniteSampler', True), ('DefaultSampler', True)],
)
def test_a_resumed_run_sees_what_the_stock_loop_would(
    tiny_run, sampler, by_aspect, begin, tmp_path, no_pause
):
    loader = build_loader(tiny_run, tmp_path / 'stock', sampler, 0, by_aspect)
    expected = train(IterBasedTrainLoop, loader)
    loader = build_loader(tiny_run, tmp_path / 'ours', sampler, 0, by_aspect)
    assert train(ResumableIterBasedTrainLoop, loader, begin) == expected[begin:]
    fetched = [int(line) for line in (tmp_path / 'ours').read_text().split()]
    assert fetched == sum(expected[begin:], [])  # each sample decoded once, no other


@pytest.mark.parametrize('sampler', ['InfiniteSampler', 'DefaultSampler'])
def test_workers_fetch_no_more_than_they_look_ahead(tiny_run, sampler, tmp_path, no_pause):
    expected = train(
        IterBasedTrainLoop, build_loader(tiny_run, tmp_path / 'stock', sampler, workers=0)
    )
    loader = build_loader(tiny_run, tmp_path / 'ours', sampler, workers=2)
    assert train(ResumableIterBasedTrainLoop, loader, begin=9) == expected[9:]
    fetched = (tmp_path / 'ours').read_text().split()
    ahead = 0 if sampler == 'DefaultSampler' else loader.prefetch_factor * loader.num_workers
    remaining = sum(expected[9:], [])
    assert len(remaining) <= len(fetched) <= len(remaining) + (ahead + 2) * BATCH


def test_far_into_a_run_only_what_follows_is_fetched(tiny_run, tmp_path):
    loader = build_loader(tiny_run, tmp_path / 'log', 'InfiniteSampler', workers=0)
    recorder = Recorder()
    loop = ResumableIterBasedTrainLoop(recorder, loader, 50_002)
    loop._iter = 50_000
    loop.run()
    assert len((tmp_path / 'log').read_text().split()) == 2 * BATCH
    # a long way round: every sample of the stream, by the sampler itself
    sampler = build_loader(tiny_run, tmp_path / 'log', 'InfiniteSampler', 0).sampler
    stream = [index for index, _ in zip(sampler, range(50_002 * BATCH), strict=False)]
    assert recorder.samples == [stream[-2 * BATCH : -BATCH], stream[-BATCH:]]


def test_no_worker_starts_before_training(tiny_run, tmp_path):
    loader = build_loader(tiny_run, tmp_path / 'log', 'InfiniteSampler', workers=1)
    loop = ResumableIterBasedTrainLoop(Recorder(), loader, ITERS)
    assert loader._iterator is None
    assert loop.dataloader is loader and (tmp_path / 'log').read_text() == ''


def test_reads_a_stream_without_indices_through():
    class Numbers(IterableDataset):
        def __iter__(self):
            return iter(range(100))

    loader = DataLoader(Numbers(), batch_size=2)
    assert train(ResumableIterBasedTrainLoop, loader, ITERS - 2) == [[24, 25], [26, 27]]


@pytest.mark.parametrize(
    ('by_epoch', 'sampler', 'stop_at', 'resumed_at'),
    [(False, 'InfiniteSampler', 5, 4), (False, 'DefaultSampler', 7, 6)]
    + [(True, 'DefaultSampler', 6, 4)],
)
def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(
    tiny_run, by_epoch, sampler, stop_at, resumed_at, tmp_path
):
    options = dict(by_epoch=by_epoch, sampler=sampler)
    whole = tiny_run.build(tmp_path / 'whole', **options).train().state_dict()
    with pytest.raises(InterruptedError):
        tiny_run.build(tmp_path / 'broken', stop_at=stop_at, **options).train()

    fetched = tmp_path / 'fetched'
    runner = tiny_run.build(tmp_path / 'broken', resume=True, fetched=str(fetched), **options)
    state = runner.train().state_dict()
    assert runner.iter == 8
    for key, value in whole.items():
        assert torch.equal(state[key], value), key
    per_iter = [3, 3, 3, 1] * 2 if sampler == 'DefaultSampler' else [3] * 8
    assert len(fetched.read_text().split()) == sum(per_iter[resumed_at:])
    learning_rate = runner.message_hub.get_scalar('train/lr').data[0]
    expected = [0.01, 0.055, 0.1, 0.1, 0.1, 0.01, 0.01, 0.001]
    assert learning_rate.tolist() == pytest.approx(expected)


def test_a_resumed_run_without_a_given_seed_goes_on_with_the_order_of_samples(tiny_run, tmp_path):
    broken = tiny_run.build(tmp_path / 'broken', seed=None, stop_at=5)
    with pytest.raises(InterruptedError):
        broken.train()
    fetched = {name: tmp_path / name for name in ('whole', 'resumed')}
    tiny_run.build(tmp_path / 'run', seed=broken.seed, fetched=str(fetched['whole'])).train()
    resumed = tiny_run.build(
        tmp_path / 'broken', seed=None, resume=True, fetched=str(fetched['resumed'])
    )
    assert resumed.seed != broken.seed
    resumed.train()
    whole, rest = (path.read_text().split() for path in fetched.values())
    assert rest == whole[4 * BATCH :]


def test_a_seed_of_the_sampler_alone_stays(tiny_run, tmp_path):
    loader = build_loader(tiny_run, tmp_path / 'log', 'InfiniteSampler', workers=0)
    recorder = Recorder()
    recorder.seed = 1
    loop = ResumableIterBasedTrainLoop(recorder, loader, 1)
    recorder.seed = 2
    loop.run()
    assert loader.sampler.seed == 5
