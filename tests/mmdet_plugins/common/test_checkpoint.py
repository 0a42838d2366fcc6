import argparse
import codecs
import collections
import copyreg
import functools
import http.server
import io
import os
import pickle
import re
import sys
import tarfile
import threading
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModule
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler
from mmengine.registry import PARAM_SCHEDULERS
from mmengine.runner import CheckpointLoader, load_checkpoint
from mmengine.runner import checkpoint as mmengine_checkpoint

from mmdet_plugins.common import checkpoint
from mmdet_plugins.common.checkpoint import CheckpointError, load_file


class Reduced:
    """Pickles as a call, the way an attack does; ``state`` is set on what the call returns."""

    def __init__(self, function, *args, state=None) -> None:
        self.recipe = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.recipe


def save(content, path: Path, *, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def edit_pickle(path: Path, edit) -> Path:
    """Rewrite the pickle inside a checkpoint as torch.save writes it now, a zip archive."""
    with zipfile.ZipFile(path) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, 'w') as archive:
        for name, data in members:
            archive.writestr(name, edit(data) if name.endswith('data.pkl') else data)
    return path


def opcodes(*parts: bytes | str) -> bytes:
    """A pickle of protocol 4 from opcodes (bytes) and strings to push."""
    body = b''.join(
        part if isinstance(part, bytes) else b'\x8c' + bytes([len(part)]) + part.encode()
        for part in parts
    )
    return b'\x80\x04' + body + b'.'


@pytest.fixture(scope='module')
def trained(tiny_run, tmp_path_factory) -> Path:
    """A real training checkpoint: message hub, optimiser, MultiStepLR's Counter, a best score."""
    folder = tmp_path_factory.mktemp('trained')
    best = dict(save_best='tiny/acc', rule='greater')
    tiny_run.build(folder, validate=True, checkpoint=best).train()
    return folder / 'iter_8.pth'


@pytest.fixture
def contents(trained) -> dict:
    """The same checkpoint, read by the unrestricted unpickler."""
    return torch.load(trained, weights_only=False)


def assert_same(ours, reference) -> None:
    assert type(ours) is type(reference)
    if isinstance(reference, torch.Tensor):
        assert torch.equal(ours, reference)
    elif isinstance(reference, np.ndarray):
        np.testing.assert_array_equal(ours, reference)
    elif isinstance(reference, HistoryBuffer):
        assert_same(list(ours.data), list(reference.data))
        assert ours.statistics('mean', 3) == reference.statistics('mean', 3)
    elif isinstance(reference, dict):
        assert list(ours) == list(reference)
        for key in reference:
            assert_same(ours[key], reference[key])
    elif isinstance(reference, list | tuple):
        assert len(ours) == len(reference)
        for pair in zip(ours, reference, strict=True):
            assert_same(*pair)
    else:
        assert ours == reference


@pytest.mark.parametrize('legacy', [False, True], ids=['zip', 'legacy'])
def test_reads_a_training_checkpoint_in_full(contents, tmp_path, legacy):
    contents['message_hub']['runtime_info']['scores'] = np.float32([0.5, 1.5])
    contents['message_hub']['runtime_info']['best'] = np.float64(0.25)
    path = save(contents, tmp_path / 'a.pth', legacy=legacy)
    with pytest.raises(pickle.UnpicklingError):  # more than torch.load reads by default
        torch.load(path, weights_only=True)
    assert_same(load_file(path), contents)


def test_reads_what_numpy_1_wrote(contents, tmp_path):
    path = save(contents, tmp_path / 'a.pth')
    renamed = []

    def rename(data: bytes) -> bytes:
        renamed.append(data.count(b'cnumpy._core.multiarray\n'))
        return data.replace(b'cnumpy._core.multiarray\n', b'cnumpy.core.multiarray\n')

    edit_pickle(path, rename)
    assert renamed[0] > 0
    assert_same(load_file(path), contents)


def test_reads_plain_weights_and_maps_them(tmp_path):
    state = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3)).half()
    path = save(state.state_dict(), tmp_path / 'a.pth')
    loaded = load_file(path, map_location='meta')
    assert {value.device.type for value in loaded.values()} == {'meta'}
    loaded = load_file(io.BytesIO(path.read_bytes()), map_location='cpu', name='a')
    assert_same(loaded, state.state_dict())
    assert loaded._metadata == state.state_dict()._metadata


@pytest.mark.parametrize('name', sorted(
    name for name in PARAM_SCHEDULERS.module_dict
    if name.endswith('LR') and 'Momentum' not in name
))  # fmt: skip
def test_reads_the_state_of_every_scheduler(name, tmp_path):
    parameters = dict(
        CosineRestartLR=dict(periods=[2, 2], restart_weights=[1, 1], eta_min=0),
        ExponentialLR=dict(gamma=0.5),
        MultiStepLR=dict(milestones=[1, 3]),
        OneCycleLR=dict(eta_max=1, total_steps=9),
        QuadraticWarmupLR=dict(begin=0, end=5),
        ReduceOnPlateauLR=dict(monitor='loss'),
        StepLR=dict(step_size=2),
        CosineAnnealingLR=dict(T_max=5),
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    config = dict(type=name, optimizer=optimizer, **parameters.get(name, {}))
    state = PARAM_SCHEDULERS.build(config).state_dict()
    content = dict(param_schedulers=[state], message_hub=HistoryBuffer([1.0], [1]))
    assert_same(load_file(save(content, tmp_path / 'a.pth')), content)


@pytest.mark.parametrize('legacy', [False, True], ids=['zip', 'legacy'])
def test_reads_the_command_line_that_research_code_keeps(legacy, tmp_path):
    args = argparse.Namespace(lr=0.1, layers=[3, 4], data=argparse.Namespace(root='a'))
    content = dict(model={'w': torch.ones(2)}, args=args)
    assert_same(load_file(save(content, tmp_path / 'a.pth', legacy=legacy)), content)


def attacks(touch: str) -> dict[str, Reduced]:
    """Contents that would run ``touch`` or get at what could, by what they ask for."""
    return {
        'posix.system': Reduced(os.system, touch),
        'builtins.eval': Reduced(eval, f'__import__("os").system({touch!r})'),
        'builtins.exec': Reduced(exec, f'import os; os.system({touch!r})'),
        "getattr(mean, '__globals__')": Reduced(getattr, HistoryBuffer.mean, '__globals__'),
        "getattr(HistoryBuffer, '__init__')": Reduced(getattr, HistoryBuffer, '__init__'),
        "getattr(HistoryBuffer, 'statistics')": Reduced(getattr, HistoryBuffer, 'statistics'),
        "getattr(OneCycleParamScheduler, 'step')": Reduced(getattr, OneCycleParamScheduler, 'step'),
        'a call of <function HistoryBuffer.mean': Reduced(HistoryBuffer.mean, 1),
        'a call of <class': Reduced(OneCycleParamScheduler, 1),
        "_codecs.encode with 'zlib'": Reduced(codecs.encode, 'a', 'zlib'),
        'functools.partial': Reduced(functools.partial, os.system, touch),
        'torch.storage._load_from_bytes': Reduced(torch.storage._load_from_bytes, b''),
        'numpy.load': Reduced(np.load, touch),
    }


@pytest.mark.parametrize('legacy', [False, True], ids=['zip', 'legacy'])
@pytest.mark.parametrize('asks_for', list(attacks('')))
def test_refuses_what_no_checkpoint_needs(asks_for, legacy, tmp_path):
    marker = tmp_path / 'pwned'
    evil = [dict(a=(1, attacks(f'touch {marker}')[asks_for]))]
    # the buffer sends torch.load's own reader away before it sees the attack
    path = save(dict(hub=HistoryBuffer(), meta=evil), tmp_path / 'evil.pth', legacy=legacy)
    with pytest.raises(CheckpointError, match=re.escape(asks_for)) as info:
        load_file(path)
    assert str(info.value).startswith(f'{path} is refused, since it asks for')
    assert '\n' not in str(info.value)
    assert not marker.exists()


COUNTER = 'collections', 'Counter', b'\x93'
REBUILD = 'torch._utils', '_rebuild_tensor_v2', b'\x93'
NAMESPACE = 'argparse', 'Namespace', b'\x93)\x81'
HISTORY = 'mmengine.logging.history_buffer', 'HistoryBuffer.mean.__globals__', b'\x93'


@pytest.mark.filterwarnings('ignore:Detected pickle protocol 4')
@pytest.mark.parametrize(
    ('asks_for', 'data'),
    [
        # Python's unpickler follows a dotted name attribute by attribute
        ('HistoryBuffer.mean.__globals__', opcodes(*HISTORY)),
        (
            'collections.OrderedDict.fromkeys',
            opcodes('collections', 'OrderedDict.fromkeys', b'\x93'),
        ),
        # BUILD with (None, {...}) sets attributes, of the shared class or function itself
        ('setting the state of', opcodes(*COUNTER, b'N}', 'update', b'Ns\x86b')),
        ('setting the state of', opcodes(*REBUILD, b'N}', '__defaults__', b'Ns\x86b')),
        # BUILD calls a __setstate__ of the instance, and sets attributes such as __class__
        ('setting the state of', opcodes(*NAMESPACE, b'N}', '__class__', *COUNTER, b's\x86b')),
        # a call of what a call has returned, then the other opcodes that call
        ('a call of Counter', opcodes(*COUNTER, b')R)R')),
        ('an obsolete way', opcodes(*COUNTER, b')}\x92')),
        ('an obsolete way', b'(ccollections\nCounter\no.'),
        ('an obsolete way', b'(S"true"\niposix\nsystem\n.'),
    ],
    ids=[
        'dotted',
        'dotted_allowed',
        'class_state',
        'function_state',
        'namespace_class',
        'result',
        'ex',
        'obj',
        'inst',
    ],
)
def test_refuses_opcodes_that_go_round_the_list(asks_for, data, tmp_path):
    path = edit_pickle(save({}, tmp_path / 'evil.pth'), lambda _: data)
    defaults, update = torch._utils._rebuild_tensor_v2.__defaults__, collections.Counter.update
    with pytest.raises(CheckpointError, match=rf'evil.pth is refused, .* asks for .*{asks_for}'):
        load_file(path)
    assert torch._utils._rebuild_tensor_v2.__defaults__ == defaults
    assert collections.Counter.update is update


@pytest.mark.filterwarnings('ignore:Detected pickle protocol 4')
def test_a_namespace_has_no_hooks(tmp_path):
    hook = opcodes(*NAMESPACE, b'}', '__setstate__', *COUNTER, b'sb}', 'a', b'K\x01sb')
    loaded = load_file(edit_pickle(save({}, tmp_path / 'a.pth'), lambda _: hook))
    assert type(loaded) is argparse.Namespace
    assert vars(loaded) == {'__setstate__': collections.Counter, 'a': 1}


def test_refuses_a_registered_extension(tmp_path):
    copyreg.add_extension('posix', 'system', 240)
    try:
        pickle.loads(b'\x80\x02\x82\xf0.')  # from then on copyreg's cache serves it, not find_class
        path = edit_pickle(save({}, tmp_path / 'evil.pth'), lambda _: b'\x80\x02\x82\xf0.')
        with pytest.raises(CheckpointError, match='evil.pth is refused, .* obsolete'):
            load_file(path)
    finally:
        copyreg.remove_extension('posix', 'system', 240)


def test_refuses_legacy_files_in_their_first_pickle(tmp_path):
    """torch.load reads the magic number of an old file by pickle_module.load, not Unpickler."""
    marker = tmp_path / 'pwned'
    path = tmp_path / 'evil.pth'
    path.write_bytes(pickle.dumps(Reduced(os.system, f'touch {marker}'), protocol=2))
    with pytest.raises(CheckpointError, match='evil.pth is refused.*posix.system'):
        load_file(path)
    assert not marker.exists()


def test_refuses_other_archives(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / 'script.pth')
    with pytest.raises(CheckpointError, match='script.pth is refused.*TorchScript'):
        load_file(tmp_path / 'script.pth')
    with tarfile.open(tmp_path / 'old.pth', 'w') as archive:
        archive.addfile(tarfile.TarInfo('storages'))
    with pytest.raises(CheckpointError, match='old.pth is refused.*tar'):
        load_file(tmp_path / 'old.pth')


@pytest.mark.parametrize('damage', ['truncated', 'empty', 'web page', 'flipped'])
def test_names_a_damaged_file(damage, trained, tmp_path):
    data = trained.read_bytes()
    path = tmp_path / 'a.pth'
    start = data.index(b'data.pkl') + 200
    path.write_bytes({
        'truncated': data[: len(data) // 2],
        'empty': b'',
        'web page': b'<!DOCTYPE html><html>404</html>',
        'flipped': data[:start] + b'\xff' * 50 + data[start + 50 :],
    }[damage])  # fmt: skip
    with pytest.raises(CheckpointError, match=f'{path} (cannot be read|is refused)'):
        load_file(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.pth' is not a file: correct its path"):
        CheckpointLoader.load_checkpoint(str(tmp_path / 'gone.pth'))


@pytest.fixture(scope='module')
def web(tmp_path_factory):
    """A web server on this machine: its folder, address and the requests it has seen."""
    folder = tmp_path_factory.mktemp('web')
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args) -> None:
            requests.append(self.path)

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f'http://127.0.0.1:{server.server_port}', requests
        server.shutdown()


class Store:
    """Stands for the object stores, whose clients are not on the registry."""

    def __init__(self, path: Path) -> None:
        self.name, self.path = 'm.pth', path

    def get(self, name: str) -> bytes:
        return self.path.read_bytes()

    def download(self, target: str) -> None:
        Path(target).write_bytes(self.path.read_bytes())


SCHEMES = [
    '{path}', '{url}', 'torchvision://m', 'modelzoo://m', 'open-mmlab://m', 'openmmlab://m',
    'open-mmlab://local', 'open-mmlab://old', 'mmcls://m', 's3://b/m', 'petrel://b/m',
    'open-mmlab:s3://b/m', 'cluster:petrel://b/m', 'pavi://m',
]  # fmt: skip


@pytest.mark.parametrize('scheme', SCHEMES)
def test_every_scheme_reads_weights_and_refuses_attacks(scheme, web, tmp_path, monkeypatch):
    folder, address, _ = web
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    monkeypatch.setenv('MMENGINE_HOME', str(folder))
    marker = tmp_path / 'pwned'
    weights = {'backbone.w': torch.ones(2)}
    attack = weights | {'evil': Reduced(os.system, f'touch {marker}')}
    for name, content in ('good.pth', weights), ('evil.pth', attack):
        path = save(content, folder / name)
        urls = dict(m=f'{address}/{name}', local=name)
        for table in 'torchvision', 'external', 'mmcls':
            monkeypatch.setattr(mmengine_checkpoint, f'get_{table}_models', lambda urls=urls: urls)
        monkeypatch.setattr(mmengine_checkpoint, 'get_deprecated_model_names', lambda: {'old': 'm'})
        store = Store(path)
        monkeypatch.setattr(checkpoint, 'get_file_backend', lambda *_, s=store, **__: s)
        pavi = types.SimpleNamespace(modelcloud=types.SimpleNamespace(get=lambda _, s=store: s))
        monkeypatch.setitem(sys.modules, 'pavi', pavi)
        filename = scheme.format(path=path, url=urls['m'])
        if name == 'good.pth':
            loaded = CheckpointLoader.load_checkpoint(filename, map_location='cpu')
            loaded = loaded['state_dict'] if scheme.startswith('mmcls') else loaded
            assert_same(list(loaded.values()), list(weights.values()))
        else:
            with pytest.raises(CheckpointError, match='is refused.*posix.system'):
                CheckpointLoader.load_checkpoint(filename, map_location='cpu')
    assert not marker.exists()


def test_no_scheme_is_left_to_mmengine():
    loaders = CheckpointLoader._schemes.values()
    assert {loader.__module__ for loader in loaders} == {checkpoint.__name__}


def test_unknown_models_are_named_with_a_neighbour(monkeypatch):
    tables = 'get_torchvision_models', 'get_external_models', 'get_mmcls_models'
    for table in tables:
        monkeypatch.setattr(mmengine_checkpoint, table, lambda: {'resnet50': '', 'vgg16': ''})
    for scheme in 'torchvision', 'open-mmlab', 'mmcls':
        with pytest.raises(CheckpointError, match=f'{scheme}://resnet5O is .* did you mean resnet'):
            CheckpointLoader.load_checkpoint(f'{scheme}://resnet5O')


def test_downloads_once_and_whole(web, tmp_path, monkeypatch):
    folder, address, requests = web
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    save(dict(a=torch.ones(1)), folder / 'once.pth')
    for _ in range(2):
        CheckpointLoader.load_checkpoint(f'{address}/once.pth')
    assert requests.count('/once.pth') == 1
    with pytest.raises(OSError, match='404'):
        CheckpointLoader.load_checkpoint(f'{address}/none.pth')
    assert [path.name for path in tmp_path.rglob('*.pth*')] == ['once.pth']


def test_pretrained_weights_go_the_same_way(tmp_path):
    class Net(BaseModule):
        def __init__(self, **init_cfg) -> None:
            super().__init__(dict(type='Pretrained', **init_cfg))
            self.linear = torch.nn.Linear(1, 1)

    weights = {'backbone.linear.weight': torch.full((1, 1), 7.0)}
    good = save(dict(state_dict=weights, hub=HistoryBuffer()), tmp_path / 'good.pth')
    net = Net(checkpoint=str(good), prefix='backbone')
    net.init_weights()
    assert net.linear.weight.item() == 7

    evil = save(weights | {'evil': Reduced(os.system, 'true')}, tmp_path / 'evil.pth')
    for init_cfg in dict(checkpoint=str(evil)), dict(checkpoint=str(evil), prefix='backbone'):
        with pytest.raises(CheckpointError, match='posix.system'):
            Net(**init_cfg).init_weights()
    with pytest.raises(CheckpointError, match='posix.system'):
        load_checkpoint(net, str(evil))


@pytest.mark.parametrize('how', ['load_from', 'resume', 'auto_resume'])
def test_a_run_refuses_to_start_from_an_attack(how, tiny_run, contents, tmp_path):
    contents['meta']['evil'] = Reduced(os.system, 'true')
    path = save(contents, tmp_path / 'evil.pth')
    (tmp_path / 'last_checkpoint').write_text(str(path))
    start = dict(
        load_from=dict(load_from=str(path)),
        resume=dict(load_from=str(path), resume=True),
        auto_resume=dict(resume=True),
    )[how]
    with pytest.raises(CheckpointError, match=f'{path} is refused.*posix.system'):
        tiny_run.build(tmp_path, **start).train()


def test_a_resume_does_not_run_a_config_of_the_checkpoint(tiny_run, contents, tmp_path):
    """mmengine's Runner.resume hands meta['config'] to Config.fromstring, which executes it."""
    marker = tmp_path / 'pwned'
    contents['meta']['config'] = f'open({str(marker)!r}, "w")\na = 1\n'
    path = save(contents, tmp_path / 'evil.pth')
    tiny_run.build(tmp_path, load_from=str(path), resume=True).train()
    assert not marker.exists()
