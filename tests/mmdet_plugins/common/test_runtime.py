import http.server
import importlib
import os
import socket
import subprocess
import sys
import threading
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from mmengine.runner import CheckpointLoader

from mmdet_plugins.common import runtime

MASTER = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': '29500'}
NEEDS_OPERATORS = """
import torch
from . import early
torch.ops.torchvision.nms, torch.ops.torchvision.qnms
from . import ops
"""


@pytest.fixture
def torchvision(tmp_path, monkeypatch):
    """Puts a torchvision in the place of the installed one; operators get a namespace of no one."""
    for name in [name for name in sys.modules if name.split('.')[0] == 'torchvision']:
        monkeypatch.delitem(sys.modules, name)
    defined = {}
    monkeypatch.setattr(
        torch.library, 'define', lambda name, schema: defined.update({name: schema})
    )

    class Namespace:
        def __getattr__(self, name: str):
            if f'torchvision::{name}' not in defined:
                raise AttributeError(f'operator torchvision::{name} does not exist')

    monkeypatch.setattr(torch.ops, 'torchvision', Namespace(), raising=False)
    monkeypatch.syspath_prepend(tmp_path)

    def install(source: str) -> dict[str, str]:
        package = tmp_path / 'torchvision'
        package.mkdir()
        (package / '__init__.py').write_text(source)
        (package / 'early.py').write_text('')
        (package / 'ops.py').write_text('')
        importlib.invalidate_caches()
        return defined

    yield install
    for name in [name for name in sys.modules if name.split('.')[0] == 'torchvision']:
        monkeypatch.delitem(sys.modules, name)


def test_a_healthy_torchvision_is_left_alone(torchvision):
    defined = torchvision('from . import early, ops')
    runtime.mend_torchvision()
    assert not defined
    assert 'torchvision.ops' in sys.modules


def test_missing_operators_are_declared(torchvision):
    defined = torchvision(NEEDS_OPERATORS)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        runtime.mend_torchvision()
        runtime.mend_torchvision()
    schema = '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor'
    assert defined == {'torchvision::nms': schema, 'torchvision::qnms': schema}
    assert 'torchvision.ops' in sys.modules


def test_a_torchvision_that_stays_broken_is_reported_once(torchvision):
    torchvision('from . import early\nraise OSError("undefined symbol: xyz")')
    with pytest.warns(UserWarning, match='undefined symbol: xyz.*pip uninstall') as caught:
        runtime.mend_torchvision()
    assert len(caught) == 1
    assert not [name for name in sys.modules if name.startswith('torchvision')]


def test_no_torchvision_is_no_trouble(monkeypatch):
    monkeypatch.setitem(sys.modules, 'torchvision', None)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        runtime.mend_torchvision()


def test_the_installed_torchvision_imports(repo):
    """In a fresh process, as this one is mended already."""
    code = (
        'import mmdet_plugins.common.runtime, sys\n'
        'assert not {"mmdet", "mmseg", "mmcv"} & set(sys.modules)\n'
        'import torchvision.models.feature_extraction'
    )
    pytest.importorskip('torchvision')
    subprocess.run([sys.executable, '-c', code], cwd=repo, check=True)


@pytest.mark.parametrize(
    ('environment', 'device', 'starts'),
    [
        ({}, 'cpu', False),
        ({'RANK': '0'}, 'cpu', False),
        ({'RANK': '0', 'WORLD_SIZE': '1'}, 'cpu', False),
        ({'RANK': '0', 'WORLD_SIZE': '1', 'MASTER_ADDR': 'a'}, 'cpu', False),
        ({'RANK': '0', 'WORLD_SIZE': '1', **MASTER}, 'cpu', True),
        ({'RANK': '1', 'WORLD_SIZE': '2', **MASTER}, 'cuda', False),
        ({'RANK': '1', 'WORLD_SIZE': '2', **MASTER}, 'cpu', True),
    ],
)
def test_a_process_group_starts_only_for_cpu_ranks(environment, device, starts, monkeypatch):
    for name in 'RANK', 'WORLD_SIZE', *MASTER:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    calls = []
    monkeypatch.setattr(runtime, 'get_device', lambda: device)
    monkeypatch.setattr(runtime.dist, 'init_process_group', calls.append)
    runtime.init_cpu_process_group()
    assert calls == ['gloo'] * starts


RANK_CODE = """
import sys, torch
import mmdet_plugins.common.runtime
from mmengine.dist import all_reduce, get_backend, get_dist_info, init_dist
from mmengine.runner import CheckpointLoader, Runner
rank, world_size = get_dist_info()
assert (world_size, get_backend()) == (2, 'gloo')
total = torch.tensor([rank + 1])
all_reduce(total)
assert total.item() == 3
loaded = CheckpointLoader.load_checkpoint(sys.argv[1] + '/good.pth')
assert loaded['a'].item() == 7
try:
    CheckpointLoader.load_checkpoint(sys.argv[1] + '/missing.pth')
except OSError as error:
    assert '404' in str(error)
else:
    raise AssertionError
"""


def test_two_ranks_reduce_and_download_once(repo, tmp_path):
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args) -> None:
            requests.append(Path(self.path).name)

    torch.save(dict(a=torch.tensor(7)), tmp_path / 'good.pth')
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    with http.server.ThreadingHTTPServer(
        ('127.0.0.1', 0), partial(Handler, directory=str(tmp_path))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = os.environ | {
            'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port),
            'TORCH_HOME': str(tmp_path / 'cache'), 'CUDA_VISIBLE_DEVICES': '',
        }  # fmt: skip
        address = f'http://127.0.0.1:{server.server_port}'
        ranks = [
            subprocess.Popen(
                [sys.executable, '-c', RANK_CODE, address],
                cwd=repo,
                env=environment | {'RANK': str(rank), 'LOCAL_RANK': str(rank)},
            )
            for rank in range(2)
        ]
        assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
        server.shutdown()
    assert requests.count('good.pth') == 1


def test_a_second_import_changes_nothing():
    before = dict(CheckpointLoader._schemes)
    importlib.reload(runtime)
    assert CheckpointLoader._schemes == before
