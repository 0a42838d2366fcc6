"""A tiny training run for the tests of hooks, loops and checkpoints."""

from types import ModuleType

import pytest


@pytest.fixture(scope='session')
def tiny_run(load_script) -> ModuleType:
    return load_script('tests/mmdet_plugins/common/tiny_run.py')
