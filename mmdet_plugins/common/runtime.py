"""Importing this module makes the OpenMMLab stack run on a current torch.

It is the first entry of every config's ``custom_imports``: early enough for mmengine's environment
report, the process group and the first checkpoint. A healthy environment is left as it is, and a
second import does nothing.
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

    A wheel whose compiled part does not fit the installed torch (no wheel fits some CPU builds)
    dies while it describes two operators that were never declared. They are declared here, without
    a kernel, and only after the plain import has failed. A torchvision that fails for another
    reason is reported by one warning; one that is not installed is not missed.
    """
    if importlib.util.find_spec('torchvision') is None or _try_import('torchvision') is None:
        return
    for operator in ('nms', 'qnms'):
        if not hasattr(torch.ops.torchvision, operator):
            torch.library.define(f'torchvision::{operator}', _NMS_SCHEMA)
    error = _try_import('torchvision')
    if error is not None:
        warnings.warn(
            f'torchvision cannot be imported beside torch {torch.__version__} ({error}), and '
            "mmengine's environment report will stop at it: install the torchvision made for this "
            'torch, or remove it with "pip uninstall torchvision".',
            stacklevel=2,
        )


def _try_import(package: str) -> Exception | None:
    """Import ``package``; if that fails, forget the half of it that is loaded and return why."""
    try:
        importlib.import_module(package)
    except Exception as error:  # ImportError, OSError, RuntimeError, ...: as the binary is broken
        for name in [n for n in sys.modules if n == package or n.startswith(f'{package}.')]:
            del sys.modules[name]
        return error
    return None


def init_cpu_process_group() -> None:
    """Start a gloo process group if a launcher asks for ranks and there is no accelerator.

    mmengine's ``init_dist`` calls ``torch.cuda.set_device`` whatever the backend, but is not called
    where a group exists. The launcher's variables are torchrun's; where one is missing, the ranks
    are not meant for torch.
    """
    if (
        {'RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'} <= os.environ.keys()
        and get_device() == 'cpu'
        and dist.is_available()
        and not dist.is_initialized()
    ):
        dist.init_process_group('gloo')


mend_torchvision()
init_cpu_process_group()
register_safe_schemes()
