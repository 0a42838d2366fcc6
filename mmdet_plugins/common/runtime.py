"""Importing this module makes the OpenMMLab stack run on a current torch.

It is the first entry of every config's ``custom_imports``: early enough for mmengine's environment report, the process
group and the first checkpoint. Importing it again, or in a healthy environment, changes nothing.
"""

import importlib
import importlib.util
import os
import sys
import warnings

import torch
import torch.distributed as dist
from mmengine.device import get_device

from mmdet_plugins.common.checkpoint import register_safe_schemes

_NMS_SCHEMA = '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor'


def mend_torchvision() -> None:
    """Make ``import torchvision`` work where only its compiled operators are missing.

    A torchvision wheel whose compiled part does not fit the installed torch (there is none for some CPU builds) dies
    while it describes operators that were never declared: ``torchvision::nms`` and ``torchvision::qnms``. They are
    declared here, without a kernel, and only after the plain import has failed. A torchvision that fails for another
    reason is reported with one warning; one that is not installed is nobody's loss.
    """
    if importlib.util.find_spec('torchvision') is None or _imports('torchvision') is None:
        return
    for name in ('nms', 'qnms'):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f'torchvision::{name}', _NMS_SCHEMA)
    error = _imports('torchvision')
    if error is not None:
        warnings.warn(
            f'torchvision cannot be imported beside torch {torch.__version__} ({error}), and mmengine will stop at '
            'its environment report: install the torchvision release made for this torch, or remove it with '
            '"pip uninstall torchvision".',
            stacklevel=2,
        )


def _imports(package: str) -> Exception | None:
    """Import ``package``; on failure forget its half-imported modules and return the error."""
    try:
        importlib.import_module(package)
    except (
        Exception
    ) as error:  # a broken binary raises ImportError, OSError, RuntimeError or AttributeError
        for name in [n for n in sys.modules if n == package or n.startswith(f'{package}.')]:
            del sys.modules[name]
        return error
    return None


def init_cpu_process_group() -> None:
    """Start a gloo process group where a launcher asked for ranks and the machine has no accelerator.

    mmengine's ``init_dist`` calls ``torch.cuda.set_device`` whatever the backend, but leaves an existing group alone.
    """
    if (
        'RANK' in os.environ
        and int(os.environ.get('WORLD_SIZE', 1)) > 1
        and get_device() == 'cpu'
        and dist.is_available()
        and not dist.is_initialized()
    ):
        dist.init_process_group('gloo')


mend_torchvision()
init_cpu_process_group()
register_safe_schemes()
