"""Two CPU ranks train as one process with the doubled batch does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name('parity_run.py')
CONFIG = 'configs/uvo/tiny/cascade-rpn_tiny_demo.py'


@pytest.fixture(scope='module')
def runs(repo, tmp_path_factory):
    """What one and two processes saved; both run at once."""
    folder = tmp_path_factory.mktemp('parity')
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        port = server.getsockname()[1]
    ranks = ['-m', 'torch.distributed.run', '--nproc_per_node=2', f'--master_port={port}']
    environ = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '-1'}
    children = {}
    for count, launcher in ((1, []), (2, ranks)):
        command = [sys.executable, *launcher, str(SCRIPT), CONFIG, str(folder / f'{count}.pth')]
        children[count] = subprocess.Popen(
            command,
            cwd=repo,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    saved = {}
    for count, child in children.items():
        output, _ = child.communicate()
        assert child.returncode == 0, output[-3000:]
        saved[count] = torch.load(folder / f'{count}.pth')
        assert saved[count]['world_size'] == count
    return saved


def test_losses_follow_for_20_steps(runs):
    one, two = runs[1], runs[2]
    assert one['names'] == two['names'] and one['curve'].shape == (20, len(one['names']))
    torch.testing.assert_close(two['curve'], one['curve'], rtol=1e-4, atol=0)
    total = one['curve'][:, one['names'].index('loss')]
    assert total[-5:].mean() < 0.95 * total[:5].mean(), (
        'nothing was learnt, so nothing was compared'
    )


def test_weights_end_where_one_process_ends(runs):
    """The difference is small beside the way that each tensor went."""
    one, two = runs[1], runs[2]
    moved = 0
    for start, ours, theirs in zip(one['start'], two['end'], one['end'], strict=True):
        way = (theirs - start).norm()
        assert (ours - theirs).norm() <= 1e-3 * way + 1e-7
        moved += bool(way > 0)
    assert moved == len(one['start']), 'every parameter is trained'
