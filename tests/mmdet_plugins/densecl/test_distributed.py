"""Shuffling BN on two CPU ranks."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name('shuffle_run.py')


@pytest.fixture(scope='module')
def ranks(repo, tmp_path_factory):
    """What each of two ranks saved."""
    folder = tmp_path_factory.mktemp('shuffle')
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        port = server.getsockname()[1]
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2']
    command += [f'--master_port={port}', str(SCRIPT), str(folder)]
    environ = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '-1'}
    environ['PYTHONPATH'] = os.pathsep.join([str(repo), environ.get('PYTHONPATH', '')])
    done = subprocess.run(command, cwd=repo, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return [torch.load(folder / f'{rank}.pth') for rank in range(2)]


@pytest.mark.parametrize('num', [1, 6, 7])
def test_samples_travel_and_come_home(ranks, num):
    found = [rank['exchanged'][num] for rank in ranks]
    everyone = torch.cat([one['samples'] for one in found])[:, 0, 0].sort().values
    assert torch.equal(
        torch.cat([one['visiting'] for one in found])[:, 0, 0].sort().values, everyone
    )
    for rank, one in enumerate(found):
        assert len(one['visiting']) == num
        strangers = (one['visiting'][:, 0, 0] // 100 != rank).sum()
        assert strangers == num // 2  # half, and the odd one stays
        doubled, flag = one['home']
        assert torch.equal(doubled, 2 * one['samples'])
        assert torch.equal(flag, one['samples'][:, 0, 0].bool())


def test_keys_are_normalised_beside_other_images(ranks):
    """Without it a rank's keys share the statistics of its queries' images."""
    for flag in (False, True):
        first, second = (rank['statistics'][flag] for rank in ranks)
        assert not torch.equal(first, second)
    for rank in ranks:
        assert not torch.allclose(rank['statistics'][False], rank['statistics'][True], rtol=1e-3)
    totals = [sum(rank['statistics'][flag] for rank in ranks) for flag in (False, True)]
    torch.testing.assert_close(*totals, rtol=1e-4, atol=1e-6)  # the same images in all


def test_with_frozen_statistics_it_changes_nothing(ranks):
    for rank in ranks:
        plain, shuffled = rank['logged'][False], rank['logged'][True]
        torch.testing.assert_close(shuffled, plain, rtol=1e-4, atol=1e-6)
    assert torch.equal(ranks[0]['logged'][True]['queue'], ranks[1]['logged'][True]['queue'])
