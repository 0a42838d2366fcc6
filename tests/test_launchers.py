"""The four ways of starting a run, each on a toy model that trains in a second on CPU."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOY = '''
"""A linear model whose loss and gradient are known, and eight numbers to train it on."""
import sys

import torch
from mmengine.dist import all_reduce, get_rank
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS
from torch.utils.data import Dataset

@DATASETS.register_module()
class ToyDataset(Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, index):
        return dict(inputs=torch.tensor(float(index)))

@MODELS.register_module()
class ToyModel(BaseModel):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
    def forward(self, inputs, mode='tensor'):
        inputs = torch.stack(list(inputs)) if isinstance(inputs, (list, tuple)) else inputs
        # One write: the ranks share a pipe, and print's pieces would mingle.
        sys.stdout.write(f'seen by rank {get_rank()} {mode} {inputs.tolist()}\\n')
        sys.stdout.flush()
        if mode == 'loss':
            return dict(loss=(self.weight * inputs).mean())
        return [dict(value=float(self.weight * x)) for x in inputs]

@METRICS.register_module()
class ToyMetric(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results += [sample['value'] for sample in data_samples]
    def compute_metrics(self, results):
        return dict(total=sum(results), samples=len(results))
'''
CONFIG = """
custom_imports = dict(imports=['mmdet_plugins.common.runtime', 'toy'], allow_failed_imports=False)
model = dict(type='ToyModel')
train_dataloader = dict(batch_size=2, num_workers=0, dataset=dict(type='ToyDataset'),
                        sampler=dict(type='DefaultSampler', shuffle=False))
test_dataloader = dict(batch_size=2, num_workers=0, dataset=dict(type='ToyDataset'),
                       sampler=dict(type='DefaultSampler', shuffle=False))
train_cfg = dict(type='IterBasedTrainLoop', max_iters=2)
test_cfg = dict()
test_evaluator = dict(type='ToyMetric')
optim_wrapper = dict(optimizer=dict(type='SGD', lr=1.0))
auto_scale_lr = dict(base_batch_size=8)
default_hooks = dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2))
"""


@pytest.fixture
def toy(tmp_path):
    (tmp_path / 'toy.py').write_text(TOY)
    (tmp_path / 'toy_config.py').write_text(CONFIG)
    return tmp_path


def free_port() -> str:
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        return str(server.getsockname()[1])


def run(command: list, folder: Path, **environ: str) -> str:
    """Output of a command that has to succeed, run in ``folder`` as in an active environment."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])
    environ = {'PATH': path, 'PYTHONPATH': str(folder), 'PORT': free_port(), **environ}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '-1', **environ},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


def weight(work_dir: Path) -> float:
    checkpoint = torch.load(work_dir / 'iter_2.pth', weights_only=False)  # written by the test
    return checkpoint['state_dict']['weight'].item()


def test_one_process_trains_resumes_and_tests(repo, toy):
    train = [sys.executable, repo / 'tools' / 'train.py', 'toy_config.py']
    run(train, toy)
    work_dir = toy / 'work_dirs' / 'toy_config'
    assert weight(work_dir) == -(0.5 + 2.5)  # batches (0, 1) and (2, 3)
    out = run([*train, '--resume', '--cfg-options', 'train_cfg.max_iters=3'], toy)
    assert 'seen by rank 0 loss [4.0, 5.0]' in out and out.count(' loss [') == 1
    test = [sys.executable, repo / 'tools' / 'test.py', 'toy_config.py', work_dir / 'iter_2.pth']
    out = run([*test, '--out', 'predictions.pkl'], toy)
    assert 'total: -84.0000' in out and 'samples: 8' in out  # -3 times 0 + 1 + ... + 7
    assert (toy / 'predictions.pkl').stat().st_size > 0


def test_two_gloo_ranks_share_the_batch(repo, toy):
    out = run(['bash', repo / 'tools' / 'dist_train.sh', 'toy_config.py', 2], toy)
    assert 'seen by rank 0 loss [0.0, 2.0]' in out and 'seen by rank 1 loss [1.0, 3.0]' in out
    work_dir = toy / 'work_dirs' / 'toy_config'
    assert weight(work_dir) == -((0 + 1 + 2 + 3) + (4 + 5 + 6 + 7)) / 4
    checkpoint = work_dir / 'iter_2.pth'
    out = run(['bash', repo / 'tools' / 'dist_test.sh', 'toy_config.py', checkpoint, 2], toy)
    assert 'total: -196.0000' in out and 'samples: 8' in out  # -7 times 28, over both ranks


def test_slurm_asks_for_the_resources_and_runs(repo, toy):
    stub = toy / 'bin' / 'srun'
    stub.parent.mkdir()
    stub.write_text(
        '#!/usr/bin/env bash\nprintf "%s\\n" "$@" >srun.args\n'
        'while [ "$1" != python ]; do shift; done\n'
        'export SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_LOCALID=0 SLURM_NODELIST=here\n'
        f'export RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT={free_port()}\nexec "$@"\n'
    )
    stub.chmod(0o755)
    path = os.pathsep.join([str(stub.parent), str(Path(sys.executable).parent), os.environ['PATH']])
    environ = dict(PATH=path, GPUS='4', GPUS_PER_NODE='2', SRUN_ARGS='--qos=high --time=10')
    tools = repo / 'tools'
    train = ['bash', tools / 'slurm_train.sh', 'part', 'job', 'toy_config.py', 'here']
    run([*train, '--auto-scale-lr'], toy, **environ)
    assert (toy / 'srun.args').read_text().splitlines() == [
        '-p', 'part', '--job-name=job', '--gres=gpu:2', '--ntasks=4', '--ntasks-per-node=2',
        '--cpus-per-task=5', '--kill-on-bad-exit=1', '--qos=high', '--time=10', 'python', '-u',
        f'{tools}/train.py', 'toy_config.py', '--work-dir=here', '--auto-scale-lr',
        '--launcher=slurm',
    ]  # fmt: skip
    assert weight(toy / 'here') == -3.0 / 4  # batch 2 of a base of 8
    out = run(['bash', tools / 'slurm_test.sh', 'part', 'job', 'toy_config.py', 'here/iter_2.pth'],
              toy, **environ)  # fmt: skip
    assert 'total: -21.0000' in out


@pytest.mark.parametrize('script', ['dist_train', 'dist_test', 'slurm_train', 'slurm_test'])
def test_shell_launchers_say_how_to_call_them(repo, script):
    result = subprocess.run(['bash', repo / 'tools' / f'{script}.sh', 'a'], capture_output=True)
    assert result.returncode == 2 and b'usage: ' in result.stderr


@pytest.mark.parametrize(
    ('script', 'options', 'sentence'),
    [
        ('train', ['--amp'], '--amp needs a GPU'),
        (
            'train',
            ['--auto-scale-lr', '--cfg-options', 'auto_scale_lr._delete_=True'],
            'base_batch',
        ),
        ('test', ['none.pth', '--tta'], 'no tta_model'),
    ],
)
def test_options_that_cannot_work_end_in_one_sentence(repo, toy, script, options, sentence):
    result = subprocess.run(
        [sys.executable, repo / 'tools' / f'{script}.py', 'toy_config.py', *options],
        cwd=toy,
        env={**os.environ, 'PYTHONPATH': str(toy), 'CUDA_VISIBLE_DEVICES': '-1'},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert sentence in result.stderr.splitlines()[-1]


def test_mim_finds_the_packages_from_any_folder(toy):
    """The stock script, which has no path to the checkout, imports what the config names."""
    mim = Path(sys.executable).parent / 'mim'
    host = 'mmdet'
    from importlib.metadata import distributions

    if any(dist.metadata['Name'] == 'onedl-mim' for dist in distributions()):
        host = 'onedl-mmdetection'
    run([mim, 'train', host, 'toy_config.py', '--work-dir', 'stock'], toy)
    assert weight(toy / 'stock') == -3.0
