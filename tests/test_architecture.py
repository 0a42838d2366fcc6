"""The laws of the layout: what may import what, and how registered classes are called."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ('mmdet_plugins', 'mmseg_plugins')
SHARED = ('ops', 'common')
# what the names that a room registers begin with
PREFIXES = {
    'mmdet_plugins.cascade_rpn': 'UVO',
    'mmdet_plugins.freesolo': 'FreeSOLO',
    'mmdet_plugins.solo': 'SOLO',
    'mmseg_plugins.box_crop': 'BoxCrop',
}
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob('*.py')
               if '.mim' not in path.parts)  # fmt: skip


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def imports(path: Path, *, top_level: bool = False) -> Iterator[str]:
    """Absolute names of the modules that a file imports, anywhere or when it is imported itself."""
    tree = ast.parse(path.read_text(encoding='utf-8'))
    package = module_name(path).split('.')
    if path.name != '__init__.py':
        package = package[:-1]
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = '.'.join([*base, *([node.module] if node.module else [])])
            yield base
            yield from (f'{base}.{alias.name}' for alias in node.names)


def room_of(module: str) -> str | None:
    """``mmdet_plugins.cascade_rpn`` for anything inside it; None for shared code and strangers."""
    parts = module.split('.')
    if parts[0] in PACKAGES and len(parts) > 1 and (ROOT / parts[0] / parts[1]).is_dir():
        return None if parts[1] in SHARED else '.'.join(parts[:2])
    return None


ROOMS = sorted({room for path in FILES if (room := room_of(module_name(path)))})


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_rooms_are_found():
    assert set(PREFIXES) == set(ROOMS), 'a new room states the prefix of its class names above'


@pytest.mark.parametrize('path', FILES, ids=module_name)
def test_imports_obey_the_laws(path):
    name = module_name(path)
    for other in imports(path):
        room = room_of(other)
        if room:
            assert room == room_of(name), f'{name} imports {other}: rooms are imported by nobody'
        top = other.split('.')[0]
        assert top not in ('projects', 'tools', 'tests', 'configs'), f'{name} imports {other}'
        if name.startswith('mmdet_plugins.ops'):
            assert (
                not top.startswith('mm')
                or other.startswith('mmdet_plugins.ops')
                or (other == 'mmdet_plugins')
            ), f'{name} imports {other}: ops are pure'


def test_relative_imports_are_resolved(tmp_path, monkeypatch):
    file = tmp_path / 'mmdet_plugins' / 'room' / 'head.py'
    file.parent.mkdir(parents=True)
    file.write_text(
        'from ..other.head import A\nfrom . import losses\ndef f():\n    import torch\n'
    )
    monkeypatch.setitem(globals(), 'ROOT', tmp_path)
    found = set(imports(file))
    assert {'mmdet_plugins.other.head', 'mmdet_plugins.room.losses', 'torch'} <= found
    assert 'torch' not in set(imports(file, top_level=True))


def test_what_the_segmenter_shares_needs_no_mmdet():
    """mmseg users need not have mmdet: follow the imports of mmseg_plugins through common/."""
    by_name = {module_name(path): path for path in FILES}
    queue = [path for name, path in by_name.items() if name.startswith('mmseg_plugins')]
    seen = set()
    while queue:
        path = queue.pop()
        for other in imports(path, top_level=True):
            assert other.split('.')[0] != 'mmdet', f'{module_name(path)} imports {other}'
            if other in by_name and other not in seen:
                seen.add(other)
                queue.append(by_name[other])


@pytest.mark.parametrize('package', [*PACKAGES, 'mmdet_plugins.common', 'mmdet_plugins.cli'])
def test_packages_import_nothing_heavy(package):
    loaded = run(f'import sys, {package}; print(*sys.modules)').split()
    heavy = ('torch', 'numpy', 'cv2', 'mmengine', 'mmcv', 'mmdet', 'mmseg')
    assert not set(heavy) & set(loaded)


def test_ops_run_without_openmmlab():
    names = [
        module_name(path) for path in FILES if module_name(path).startswith('mmdet_plugins.ops')
    ]
    loaded = run(f'import sys\nfor name in {names}:\n    __import__(name)\nprint(*sys.modules)')
    assert not {'mmengine', 'mmcv', 'mmdet', 'mmseg'} & set(loaded.split())


def registrations() -> Iterator[tuple[str, str, ast.Call]]:
    """Module, registered name and decorator of every class that registers."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            for decorator in node.decorator_list if isinstance(node, ast.ClassDef) else ():
                if isinstance(decorator, ast.Call) and 'register_module' in ast.unparse(decorator):
                    given = [ast.literal_eval(argument) for argument in decorator.args]
                    yield module_name(path), *(given or [node.name]), decorator


def test_registered_names_carry_the_prefix_and_never_force():
    found = list(registrations())
    assert len({name for _, name, _ in found}) == len(found) > 0
    for module, name, decorator in found:
        assert not decorator.keywords, f'{module}: {name} registers with more than a name'
        if room := room_of(module):
            assert name.startswith(PREFIXES[room]), f'{room}: {name}'


@pytest.mark.parametrize('order', [('mmdet', 'mmseg'), ('mmseg', 'mmdet')], ids='-'.join)
def test_all_modules_register_beside_both_hosts(order):
    """A name that a host has too would raise KeyError here."""
    names = ['mmdet_plugins.common.runtime', *(f'{host}.utils' for host in order)]
    names += [module_name(path) for path in FILES]
    out = run(
        f'import importlib\nfor name in {names}:\n    importlib.import_module(name)\n'
        + ''.join(
            f'from {host}.utils import register_all_modules as register\n'
            'register(init_default_scope=False)\n'
            for host in order
        )
        + 'print("registered")'
    )
    assert out.split()[-1] == 'registered'
