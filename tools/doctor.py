"""Says what is installed, what is known not to work together, and the one line that mends it.

    make doctor

Needs only the standard library: where nothing is installed it says so. Ends with status 1 when
something is broken, 0 otherwise. Gathering facts and judging them are separate, so that each
judgement is tested on made-up facts.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
# import name -> the distributions that provide it, OpenMMLab's first
PROVIDERS = {
    'torch': ('torch',),
    'torchvision': ('torchvision',),
    'mmengine': ('mmengine', 'mmengine-lite', 'onedl-mmengine'),
    'mmcv': ('mmcv', 'mmcv-lite', 'onedl-mmcv'),
    'mmdet': ('mmdet', 'onedl-mmdetection'),
    'mmseg': ('mmsegmentation', 'onedl-mmsegmentation'),
    'mim': ('openmim', 'onedl-mim'),
    'hotcoco': ('hotcoco',),
    'pycocotools': ('pycocotools',),
    'timm': ('timm',),
    'numpy': ('numpy',),
    'cv2': (
        'opencv-python',
        'opencv-python-headless',
        'opencv-contrib-python',
        'opencv-contrib-python-headless',
    ),
    'setuptools': ('setuptools',),
    'mminstance': ('mminstance',),
}
REQUIRED = ('torch', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'hotcoco', 'numpy', 'cv2')
REMAKE = 'rm -f .venv/mminstance.stamp && make env'

# Imports in one child process, each reported as it ends, so that a crash names its culprit.
PROBE = """
import importlib, json
def probe(name, action):
    print(json.dumps(['start', name, None]), flush=True)
    try:
        print(json.dumps(['end', name, action()]), flush=True)
    except BaseException as error:
        text = (type(error).__name__ + ': ' + str(error).strip()).splitlines()[0]
        print(json.dumps(['fail', name, text]), flush=True)
def load(name):
    return lambda: importlib.import_module(name) and None
def gpu():
    from torch import cuda
    if not cuda.is_available():
        return None
    return '{} sm_{}{}'.format(cuda.get_device_name(0), *cuda.get_device_capability(0))
def cuda_ops():
    import torch
    from mmcv.ops import nms
    boxes = torch.tensor([[0., 0., 1., 1.]], device='cuda')
    nms(boxes, boxes[:, 0], 0.5)
for name in ('numpy', 'cv2', 'torch'):
    probe(name, load(name))
probe('gpu', gpu)
probe('torchvision', load('torchvision'))
probe('runtime', load('mmdet_plugins.common.runtime'))
probe('torchvision mended', load('torchvision'))
for name in ('mmengine', 'mmcv', 'mmcv._ext', 'hotcoco', 'pycocotools', 'timm', 'mmdet.models',
             'mmseg.models', 'mim'):
    probe(name, load(name))
probe('cuda_ops', cuda_ops)
"""


@dataclass
class Facts:
    """What is known about an environment; ``versions`` by import name, ``errors`` by probe name."""

    python: str = '3.11.0'
    versions: dict[str, tuple[str, str]] = field(default_factory=dict)  # (distribution, version)
    errors: dict[str, str] = field(default_factory=dict)
    gpu: str | None = None
    mim_folders: dict[str, bool] = field(default_factory=dict)  # host -> its .mim is there
    doubled: dict[str, dict[str, str]] = field(default_factory=dict)  # all providers of one import

    def version(self, name: str) -> tuple[int, ...]:
        """Numeric version of an import name; empty when it is not installed."""
        return numbers(self.versions[name][1]) if name in self.versions else ()


@dataclass(frozen=True)
class Finding:
    """One known bad state and the line that mends it."""

    level: Literal['broken', 'note']
    what: str
    mend: str


def numbers(version: str) -> tuple[int, ...]:
    """``'2.13.0+cpu'`` -> ``(2, 13, 0)``."""
    return tuple(int(part) for part in re.match(r'\d+(?:\.\d+)*', version)[0].split('.'))


def check_missing(facts: Facts) -> Iterator[Finding]:
    missing = [PROVIDERS[name][0] for name in REQUIRED if name not in facts.versions]
    if missing:
        yield Finding('broken', f'not installed: {", ".join(missing)}', REMAKE)
    elif 'mminstance' not in facts.versions:
        yield Finding(
            'note',
            'mminstance itself is not installed: its configs work only from here',
            'pip install --no-deps --no-build-isolation -e .',
        )


def check_setuptools(facts: Facts) -> Iterator[Finding]:
    if (
        facts.version('setuptools') >= (81,)
        and 'onedl' not in facts.versions.get('mmengine', ('',))[0]
    ):
        yield Finding(
            'broken',
            f'setuptools {facts.versions["setuptools"][1]} has no pkg_resources, which '
            "mim, mmcv's build and every `mmdet::` config base import",
            'pip install "setuptools<81"',
        )


def check_mmcv_ceiling(facts: Facts) -> Iterator[Finding]:
    stock = facts.versions.get('mmdet', ('',))[0] == 'mmdet'
    if stock and facts.version('mmcv') >= (2, 2):
        yield Finding(
            'broken',
            f'mmdet {facts.versions["mmdet"][1]} refuses mmcv '
            f'{facts.versions["mmcv"][1]}: it asserts mmcv < 2.2.0',
            'MMCV_WITH_OPS=1 pip install --no-build-isolation mmcv==2.1.0',
        )


def check_mmengine(facts: Facts) -> Iterator[Finding]:
    if facts.versions.get('mmengine', ('',))[0] == 'mmengine':
        version = facts.version('mmengine')
        if version >= (0, 11) or version < (0, 10, 7):
            yield Finding(
                'broken',
                f'mmengine {facts.versions["mmengine"][1]}: 0.11 cannot find `mmdet::` bases, '
                'before 0.10.7 it does not import on a current torch',
                'pip install mmengine==0.10.7',
            )


def check_doubled(facts: Facts) -> Iterator[Finding]:
    for name, found in facts.doubled.items():
        if len(set(found.values())) > 1:  # equal versions write equal files
            yield Finding(
                'broken',
                f'{" and ".join(map(" ".join, found.items()))} write into the same package {name}',
                f'pip uninstall -y {" ".join(found)} && {REMAKE}',
            )


def check_compiled_ops(facts: Facts) -> Iterator[Finding]:
    if 'mmcv' not in facts.versions or 'mmcv' in facts.errors:
        return
    rebuild = (
        'MMCV_WITH_OPS=1 pip install --no-build-isolation --no-deps --force-reinstall '
        f'--no-cache-dir {"==".join(facts.versions["mmcv"])}'
    )
    if error := facts.errors.get('mmcv._ext'):
        what = f'mmcv has no compiled operators that load ({error})'
        yield Finding('broken', what, f'CFLAGS=-g0 {rebuild}')
    elif facts.gpu and (error := facts.errors.get('cuda_ops')):
        what = f'mmcv has no CUDA operators that run on {facts.gpu} ({error})'
        yield Finding('broken', what, f'FORCE_CUDA=1 {rebuild}')


def check_torchvision(facts: Facts) -> Iterator[Finding]:
    if 'torchvision' not in facts.versions or 'torchvision' not in facts.errors:
        return
    if 'torchvision mended' in facts.errors:
        yield Finding(
            'broken',
            'torchvision does not import, and a broken one stops every runner '
            f'({facts.errors["torchvision mended"]})',
            'pip uninstall -y torchvision',
        )
    else:
        yield Finding(
            'note',
            'torchvision has no operators for this torch; '
            'mmdet_plugins.common.runtime defines the two that its import asks for',
            "keep 'mmdet_plugins.common.runtime' first in custom_imports",
        )


def check_mim_folders(facts: Facts) -> Iterator[Finding]:
    for name, present in facts.mim_folders.items():
        if not present:
            distribution, version = facts.versions[name]
            yield Finding(
                'broken',
                f'{name} has no .mim folder (an editable install has none): '
                f'no `{name}::` config base, no `mim train {name}`',
                f'pip install --no-deps --force-reinstall {distribution}=={version}',
            )


def check_arrays(facts: Facts) -> Iterator[Finding]:
    if facts.version('numpy') >= (2,) and facts.version('cv2') and facts.version('cv2') < (4, 10):
        yield Finding(
            'broken',
            f'opencv {facts.versions["cv2"][1]} was built for NumPy 1, '
            f'NumPy {facts.versions["numpy"][1]} is installed',
            'pip install "opencv-python>=4.10"',
        )


def check_imports(facts: Facts) -> Iterator[Finding]:
    """Whatever else does not import; the checks above name the causes that are known."""
    explained = {'torchvision', 'torchvision mended', 'mmcv._ext', 'cuda_ops', 'gpu'}
    for name, error in facts.errors.items():
        root = name.split('.')[0]
        if name not in explained and (root in facts.versions or name == 'runtime'):
            yield Finding('broken', f'{name} does not import ({error})', REMAKE)


CHECKS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    check_missing,
    check_setuptools,
    check_mmcv_ceiling,
    check_mmengine,
    check_doubled,
    check_compiled_ops,
    check_torchvision,
    check_mim_folders,
    check_arrays,
    check_imports,
)


def diagnose(facts: Facts) -> list[Finding]:
    return [finding for check in CHECKS for finding in check(facts)]


def gather() -> Facts:
    """The facts of the environment that this interpreter runs in."""
    facts = Facts(python=sys.version.split()[0])
    for name, distributions in PROVIDERS.items():
        found = []
        for distribution in distributions:
            try:
                found.append((distribution, importlib.metadata.version(distribution)))
            except importlib.metadata.PackageNotFoundError:
                continue
        if found:
            facts.versions[name] = found[0]
        if len(found) > 1:
            facts.doubled[name] = dict(found)
    for name in ('mmdet', 'mmseg'):
        spec = importlib.util.find_spec(name)
        if name in facts.versions and spec and spec.origin:
            configs = Path(spec.origin).parent / '.mim' / 'configs'
            facts.mim_folders[name] = configs.is_dir()
    child = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', PROBE],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
    )
    running = None
    for line in child.stdout.splitlines():
        try:
            state, name, value = json.loads(line)
        except ValueError:
            continue  # chatter of an imported package
        running = name if state == 'start' else None
        if state == 'fail':
            facts.errors[name] = value
        elif name == 'gpu':
            facts.gpu = value
    if running:
        facts.errors[running] = f'the interpreter died, status {child.returncode}'
    return facts


def report(facts: Facts, findings: list[Finding]) -> str:
    lines = [f'{"python":12} {facts.python}']
    for name in PROVIDERS:
        distribution, version = facts.versions.get(name, ('', 'not installed'))
        lines.append(
            f'{name:12} {version}'
            + (f'  ({distribution})' if distribution not in ('', name) else '')
        )
    ops = 'absent' if 'mmcv._ext' in facts.errors or 'mmcv' not in facts.versions else 'present'
    lines += [f'{"mmcv ops":12} {ops}', f'{"gpu":12} {facts.gpu or "none"}', '']
    for finding in findings:
        lines += [f'{finding.level.upper()}: {finding.what}', f'  mend: {finding.mend}']
    broken = sum(finding.level == 'broken' for finding in findings)
    lines.append(f'{broken} broken' if broken else 'Nothing is broken')
    return '\n'.join(lines)


def main() -> int:
    facts = gather()
    findings = diagnose(facts)
    print(report(facts, findings))
    return int(any(finding.level == 'broken' for finding in findings))


if __name__ == '__main__':
    sys.exit(main())
