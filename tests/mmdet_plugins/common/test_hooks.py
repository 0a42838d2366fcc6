import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from mmcv.ops import RoIAlign
from mmengine.optim import OptimWrapper, OptimWrapperDict

from mmdet_plugins.common.checkpoint import load_file
from mmdet_plugins.common.hooks import AtomicCheckpointHook, AtomicLocalBackend, ChannelsLastHook


def files(folder: Path) -> set[str]:
    """Checkpoints, their pointer and leftovers of a run."""
    return {p.name for p in folder.iterdir() if '.pth' in p.name or 'last_checkpoint' in p.name}


def pointer(folder: Path) -> str:
    return Path((folder / 'last_checkpoint').read_text()).name


@pytest.fixture(scope='module')
def uninterrupted(tiny_run, tmp_path_factory) -> dict[str, torch.Tensor]:
    return tiny_run.build(tmp_path_factory.mktemp('run')).train().state_dict()


@pytest.fixture(scope='module')
def disasters(tiny_run, repo, tmp_path_factory) -> tuple[Path, dict[str, int], str]:
    """All disasters, each in a process of its own: their folders, exit codes and log."""
    folder = tmp_path_factory.mktemp('disasters')
    result = subprocess.run(
        [sys.executable, tiny_run.__file__, str(folder), *tiny_run.DISASTERS],
        env=os.environ | {'PYTHONPATH': f'{repo}:{os.environ.get("PYTHONPATH", "")}'},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    ends = {line[0]: int(line[1]) for line in lines if line and line[0] in tiny_run.DISASTERS}
    return folder, ends, result.stdout


def assert_resumes(tiny_run, folder: Path, expected: dict[str, torch.Tensor], **kwargs) -> None:
    """Resume, train to the end, and find what the uninterrupted run has found, and no leftovers."""
    runner = tiny_run.build(folder, resume=True, checkpoint=dict(max_keep_ckpts=1, **kwargs))
    state = runner.train().state_dict()
    assert runner.iter == 8
    for key, value in expected.items():
        assert torch.equal(state[key], value), key


@pytest.mark.parametrize(
    ('disaster', 'left', 'resumed_at'),
    [
        ('killed_half_written', {'iter_2.pth', 'last_checkpoint'}, 'iter_2.pth'),
        ('killed_before_naming', {'iter_2.pth', 'iter_4.pth', 'last_checkpoint'}, 'iter_2.pth'),
        ('killed_before_removing', {'iter_2.pth', 'iter_4.pth', 'last_checkpoint'}, 'iter_4.pth'),
    ],
)
def test_a_kill_leaves_a_checkpoint_to_resume_from(
    tiny_run, disasters, uninterrupted, disaster, left, resumed_at
):
    folder, ends, _ = disasters
    run = folder / disaster
    assert ends[disaster] == -9
    assert {name for name in files(run) if not name.endswith('.tmp')} == left
    assert any(name.endswith('.tmp') for name in files(run)) == (disaster == 'killed_half_written')
    assert pointer(run) == resumed_at
    assert load_file(run / resumed_at)['meta']['iter'] == int(resumed_at[5])

    assert_resumes(tiny_run, run, uninterrupted)
    assert files(run) == {'iter_8.pth', 'last_checkpoint'}


def test_a_kill_leaves_the_former_best_checkpoint(tiny_run, disasters):
    folder, ends, _ = disasters
    run = folder / 'killed_best_half_written'
    assert ends[run.name] == -9
    kept = {name for name in files(run) if not name.endswith('.tmp')}
    assert kept == {'best_tiny_acc_iter_2.pth', 'iter_4.pth', 'last_checkpoint'}
    assert load_file(run / 'best_tiny_acc_iter_2.pth')['meta']['iter'] == 2
    assert load_file(run / 'iter_4.pth')['message_hub']['runtime_info']['best_score'] == 1


def test_a_full_disk_costs_one_save(tiny_run, disasters, uninterrupted):
    folder, ends, log = disasters
    run = folder / 'full_for_a_while'  # at iterations 4 and 6
    assert ends[run.name] == 0
    assert files(run) == {'iter_8.pth', 'last_checkpoint'} and pointer(run) == 'iter_8.pth'
    state = load_file(run / 'iter_8.pth')
    for key, value in uninterrupted.items():
        assert torch.equal(state['state_dict'][key], value)
    assert state['message_hub']['runtime_info']['keep_ckpt_ids'] == [2, 8]
    complaints = [line for line in log.splitlines() if f'saved in {run}' in line]
    assert len(complaints) == 2
    for complaint in complaints:
        assert 'File too large' in complaint and 'free some space' in complaint
        assert f'{run}/iter_2.pth is whole' in complaint


def test_a_full_disk_at_the_last_save_is_an_error(tiny_run, disasters, uninterrupted):
    folder, ends, _ = disasters
    run = folder / 'full_at_the_end'
    assert ends[run.name] == 1
    assert 'could not be saved' in (run / 'error.txt').read_text()
    assert files(run) == {'iter_4.pth', 'last_checkpoint'} and pointer(run) == 'iter_4.pth'
    assert_resumes(tiny_run, run, uninterrupted)
    assert files(run) == {'iter_8.pth', 'last_checkpoint'}


def test_a_run_that_cannot_save_at_all_stops_at_its_first_save(disasters):
    folder, ends, _ = disasters
    run = folder / 'full_from_the_start'
    assert ends[run.name] == 1
    assert 'could not be saved' in (run / 'error.txt').read_text()
    assert files(run) == set()


def test_keeps_what_the_stock_hook_keeps(tiny_run, tmp_path):
    best = dict(save_best=['tiny/acc'], rule='greater')
    names = {}
    for hook in 'CheckpointHook', 'AtomicCheckpointHook':
        options = dict(type=hook, max_keep_ckpts=2, **best)
        tiny_run.build(tmp_path / hook, checkpoint=options, validate=True).train()
        names[hook] = files(tmp_path / hook)
    assert names['AtomicCheckpointHook'] == names['CheckpointHook'] == {
        'iter_6.pth', 'iter_8.pth', 'best_tiny_acc_iter_8.pth', 'last_checkpoint'
    }  # fmt: skip
    infos = [
        load_file(tmp_path / hook / 'iter_8.pth')['message_hub']['runtime_info'] for hook in names
    ]
    assert infos[0]['best_score'] == infos[1]['best_score'] == 4
    # one more than it keeps: what it would have to remove after a kill
    assert infos[0]['keep_ckpt_ids'] == [6, 8]
    assert infos[1]['keep_ckpt_ids'] in ([4, 6, 8], [6, 8])


def test_the_best_checkpoint_survives_a_failed_save(tiny_run, tmp_path, monkeypatch):
    best = dict(save_best='tiny/acc', rule='greater', max_keep_ckpts=1)
    runner = tiny_run.build(tmp_path, checkpoint=best)
    runner.train()
    (hook,) = (hook for hook in runner.hooks if isinstance(hook, AtomicCheckpointHook))

    def evaluate(iteration: int, score: float) -> set[str]:
        runner.train_loop._iter = iteration
        hook.after_val_epoch(runner, {'tiny/acc': score})
        return {name for name in files(tmp_path) if 'best' in name}

    assert evaluate(8, 0.5) == {'best_tiny_acc_iter_8.pth'}
    assert evaluate(8, 0.6) == {'best_tiny_acc_iter_8.pth'}  # the same name, once more
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        patch.setattr(AtomicLocalBackend, 'put', mock.Mock(side_effect=full))
        assert evaluate(9, 0.9) == {'best_tiny_acc_iter_8.pth'}
    assert runner.message_hub.get_info('best_score') == 0.6
    assert Path(hook.last_ckpt).name == 'iter_8.pth'
    assert evaluate(10, 0.7) == {'best_tiny_acc_iter_10.pth'}  # what was not saved is no record


def test_epochs_and_another_folder(tiny_run, tmp_path):
    options = dict(out_dir=str(tmp_path / 'store'), max_keep_ckpts=1)
    sampler = dict(by_epoch=True, sampler='DefaultSampler')
    tiny_run.build(tmp_path / 'run', checkpoint=options, **sampler).train()
    assert files(tmp_path / 'store' / 'run') == {'epoch_2.pth'}
    assert files(tmp_path / 'run') == {'last_checkpoint'}
    last = (tmp_path / 'run' / 'last_checkpoint').read_text()
    assert last == str(tmp_path / 'store' / 'run' / 'epoch_2.pth')


def test_another_storage_backend_is_left_to_itself(tiny_run, tmp_path):
    from mmengine.fileio import LocalBackend
    from mmengine.fileio.backends import backends

    class Elsewhere(LocalBackend):
        """Stands for a store that is not the local disk."""

    backends['tiny_elsewhere'] = Elsewhere
    try:
        options = dict(backend_args=dict(backend='tiny_elsewhere'), max_keep_ckpts=1)
        runner = tiny_run.build(tmp_path, checkpoint=options)
        runner.train()
    finally:
        del backends['tiny_elsewhere']
    (hook,) = (hook for hook in runner.hooks if isinstance(hook, AtomicCheckpointHook))
    assert type(hook.file_backend) is Elsewhere
    assert files(tmp_path) == {'iter_8.pth', 'last_checkpoint'}


@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('several', [False, True])
def test_channels_last_trains_alike_and_takes_the_state_of_the_optimiser_with_it(fused, several):
    def step(runner: SimpleNamespace) -> None:
        images = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(1))
        for optimiser in optimisers:
            optimiser.zero_grad()
        runner.model(images).square().mean().backward()
        for optimiser in optimisers:
            optimiser.step()

    weights = []
    for channels_last in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3)
        )
        optimisers = [torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)]
        optim = OptimWrapper(optimisers[0])
        runner = SimpleNamespace(
            model=model, optim_wrapper=OptimWrapperDict(all=optim) if several else optim
        )
        step(runner)  # so that there is a state, in the order of the weights
        if channels_last:
            ChannelsLastHook().before_train(runner)
        for _ in range(3):
            step(runner)
        kernel = model[2].weight
        assert kernel.is_contiguous() != channels_last
        assert kernel.is_contiguous(memory_format=torch.channels_last) == channels_last
        weights.append([weight.detach() for weight in model.parameters()])
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


def test_channels_last_refuses_who_cannot_read_it():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), RoIAlign(7))
    with pytest.raises(ValueError, match=r'model\.1 \(RoIAlign\) reads features channels-first'):
        ChannelsLastHook().before_test(SimpleNamespace(model=model))
    assert model[0].weight.is_contiguous()
