"""What every test shares."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure() -> None:
    """Mend the environment first, as every config does with its first custom import."""
    import mmdet_plugins.common.runtime  # noqa: F401


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
