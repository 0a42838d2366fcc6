"""What every test shares."""

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure() -> None:
    """Mend the environment first, as every config does with its first custom import."""
    import mmengine.config.utils

    import mmdet_plugins.common.runtime  # noqa: F401

    # A config with a base `mmdet::...` makes mmengine parse all of mmdet's metafiles each time.
    mmengine.config.utils.load = functools.cache(mmengine.config.utils.load)


def _forget_global_state() -> Iterator[None]:
    """Undo the default scope, loggers and visualizers that a runner or a config left behind."""
    from mmengine.logging import MessageHub, MMLogger
    from mmengine.registry import DefaultScope
    from mmengine.visualization import Visualizer

    managers = (DefaultScope, MMLogger, MessageHub, Visualizer)
    before = [dict(manager._instance_dict) for manager in managers]
    yield
    for manager, instances in zip(managers, before, strict=True):
        manager._instance_dict.clear()
        manager._instance_dict.update(instances)


after_each_test = pytest.fixture(autouse=True)(_forget_global_state)
after_each_module = pytest.fixture(autouse=True, scope='module')(_forget_global_state)


@pytest.fixture(scope='session')
def repo() -> Path:
    """Root of the checkout."""
    return ROOT


@pytest.fixture(scope='session')
def load_script() -> Callable[[str], ModuleType]:
    """Imports a script by its path in the checkout, ``tools/doctor.py`` say."""

    def load(path: str) -> ModuleType:
        name = 'script_' + path.removesuffix('.py').replace('/', '_')
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, ROOT / path)
            sys.modules[name] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        return sys.modules[name]

    return load
