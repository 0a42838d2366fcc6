"""Reading checkpoints without running what they contain.

A checkpoint is a pickle, and a pickle is a program. Every scheme of mmengine's ``CheckpointLoader``
(local files, URLs, model-zoo names, object stores) is replaced by one that only fetches the file
and hands it to :func:`load_file`: ``torch.load(weights_only=True)`` first, then, for what training
checkpoints hold besides tensors, an unpickler with an allow-list. There is no third attempt.
"""

import argparse
import collections
import difflib
import io
import os
import os.path as osp
import pickle
import sys
import tarfile
import tempfile
import types
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.dist import get_dist_info
from mmengine.fileio import get_file_backend
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler
from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as mmengine_checkpoint

MapLocation = str | torch.device | Callable | dict | None


class CheckpointError(RuntimeError):
    """A checkpoint that is unknown, damaged, or asks for more than data."""


class _RefusedError(pickle.UnpicklingError):
    """What a pickle asked for, outside the allow-list."""


def _getattr(owner: Any, name: Any) -> Callable:
    """Look up a function that mmengine saves by its name in a class."""
    if isinstance(owner, type) and name in _METHODS.get(owner, ()):
        return getattr(owner, name)
    raise _RefusedError(f'getattr({getattr(owner, "__name__", type(owner).__name__)}, {name!r})')


def _encode(text: str, encoding: str) -> bytes:
    """Restore bytes, which pickle's protocol 2 writes as Latin-1 text."""
    if encoding != 'latin1':
        raise _RefusedError(f'_codecs.encode with {encoding!r}')
    return text.encode(encoding)


def _empty_bytes() -> bytes:
    """Restore bytes of length 0, which protocol 2 writes as a call of ``bytes``."""
    return b''


# The tables of statistics in each HistoryBuffer, and the curve in the state of a OneCycleLR.
_METHODS = {
    HistoryBuffer: ('min', 'max', 'current', 'mean'),
    OneCycleParamScheduler: ('_annealing_cos', '_annealing_linear'),
}
# All that training checkpoints of mmdet and mmseg ask for, and the command line that others keep.
# What may be called does no more than build data from its arguments. Names are compared whole, so
# that a dotted one leads nowhere.
_MAY_BE_CALLED: dict[str, Callable] = {
    'argparse.Namespace': argparse.Namespace,
    'builtins.bytes': _empty_bytes,
    'builtins.getattr': _getattr,
    '_codecs.encode': _encode,
    'collections.Counter': collections.Counter,
    'collections.OrderedDict': collections.OrderedDict,
    'mmengine.logging.history_buffer.HistoryBuffer': HistoryBuffer,
    'numpy.dtype': np.dtype,
    'numpy._core.multiarray._reconstruct': np.empty(0).__reduce__()[0],
    'numpy._core.multiarray.scalar': np.float64(0).__reduce__()[0],
    'torch._utils._rebuild_tensor_v2': torch._utils._rebuild_tensor_v2,
}
_MAY_BE_NAMED: dict[str, type] = {
    'numpy.ndarray': np.ndarray,
    'mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler': OneCycleParamScheduler,
}
_MAY_HAVE_STATE = (collections.OrderedDict, HistoryBuffer, np.ndarray, np.dtype)
_MOVED = {'__builtin__': 'builtins', 'numpy.core.multiarray': 'numpy._core.multiarray'}


class _Unpickler(pickle._Unpickler):
    """An unpickler that finds and calls what is listed above, and nothing else.

    It extends Python's pure implementation, where opcodes can be restricted as well. The compiled
    one calls whatever callable lies on its stack, and a "state" may set attributes of functions and
    classes that the whole process shares.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        path = f'{_MOVED.get(module, module)}.{name}'
        if path in _MAY_BE_CALLED:
            return _MAY_BE_CALLED[path]
        if path in _MAY_BE_NAMED:
            return _MAY_BE_NAMED[path]
        raise _RefusedError(path)

    def load_reduce(self) -> None:
        self._check_callable()
        super().load_reduce()

    def load_newobj(self) -> None:
        self._check_callable()
        super().load_newobj()

    def load_build(self) -> None:
        target, state = self.stack[-2:]
        if type(target) is argparse.Namespace and type(state) is dict:
            vars(target).update(state)  # pickle's own way heeds a __setstate__ among the values
            self.stack.pop()
            return
        if not isinstance(target, _MAY_HAVE_STATE):
            raise _RefusedError(f'setting the state of {target!r}')
        super().load_build()

    def load_refused(self) -> None:
        raise _RefusedError('an obsolete way of building objects')

    def _check_callable(self) -> None:
        if not any(self.stack[-2] is allowed for allowed in _MAY_BE_CALLED.values()):
            raise _RefusedError(f'a call of {self.stack[-2]!r}')

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.BUILD[0]] = load_build
    for _opcode in 'INST', 'OBJ', 'NEWOBJ_EX', 'EXT1', 'EXT2', 'EXT4':
        dispatch[getattr(pickle, _opcode)[0]] = load_refused


# For torch.load, which reads zip archives by ``Unpickler`` and older files by ``load`` as well.
_restricted_pickle = types.ModuleType('restricted_pickle')
_restricted_pickle.Unpickler = _Unpickler
_restricted_pickle.load = lambda file, **kwargs: _Unpickler(file, **kwargs).load()


def load_file(
    file: str | os.PathLike | BinaryIO, map_location: MapLocation = None, name: str | None = None
) -> Any:
    """Read a checkpoint, whoever made it.

    Args:
        file: Path, or a seekable binary file.
        map_location: As in ``torch.load``.
        name: What error messages call the file; its path by default.

    Raises:
        CheckpointError: The file is damaged, is a TorchScript or tar archive, or asks for
            something outside the allow-list.
    """
    name = name or str(file)
    try:
        _check_format(file)
        try:
            checkpoint = torch.load(file, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError:
            restricted = True
        else:
            restricted = False
        if restricted:  # outside the except clause, so that the tensors of the first try are free
            _rewind(file)
            checkpoint = torch.load(
                file, map_location, pickle_module=_restricted_pickle, weights_only=False
            )
    except _RefusedError as error:
        raise CheckpointError(
            f'{name} is refused, since it asks for {error}, beyond what a checkpoint is trusted '
            'with: use another file, or have its maker save the tensors of "state_dict" alone.'
        ) from None
    except OSError:
        raise
    except Exception as error:
        raise CheckpointError(
            f'{name} cannot be read as a checkpoint ({type(error).__name__}: {error}): delete it '
            'and make or download it again.'
        ) from error
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get('meta'), dict):
        # mmengine's Runner.resume would run this text, which it does not write itself, as Python.
        checkpoint['meta'].pop('config', None)
    return checkpoint


def _check_format(file: str | os.PathLike | BinaryIO) -> None:
    """Refuse the two archives that torch.load would hand to another reader than the unpickler."""
    if zipfile.is_zipfile(file):
        _rewind(file)
        with zipfile.ZipFile(file) as archive:
            if any(osp.basename(member) == 'constants.pkl' for member in archive.namelist()):
                raise _RefusedError('its TorchScript code to be run')
    else:
        _rewind(file)
        if tarfile.is_tarfile(file):
            raise _RefusedError('being unpacked as a tar archive')
    _rewind(file)


def _rewind(file: str | os.PathLike | BinaryIO) -> None:
    if hasattr(file, 'seek'):
        file.seek(0)


def load_from_local(filename: str, map_location: MapLocation = None) -> Any:
    """Load a file of this machine."""
    filename = osp.expanduser(filename)
    if not osp.isfile(filename):
        raise FileNotFoundError(
            f'The checkpoint {filename!r} is not a file: correct its path (in "last_checkpoint" if '
            'the folder of the run to be resumed was moved).'
        )
    return load_file(filename, map_location)


def load_from_http(filename: str, map_location: MapLocation = None) -> Any:
    """Load a URL by way of torch.hub's cache, which rank 0 fills before other ranks look there."""
    rank, world_size = get_dist_info()
    try:
        path = _download(filename) if rank == 0 else None
    finally:  # also on an error: the other ranks then fail by themselves instead of waiting
        if world_size > 1:
            torch.distributed.barrier()
    return load_file(path or _download(filename), map_location)


def _download(url: str) -> str:
    """Put ``url`` into torch.hub's cache, whole or not at all, unless it is there; return where."""
    folder = osp.join(torch.hub.get_dir(), 'checkpoints')
    path = osp.join(folder, osp.basename(urlparse(url).path))
    if not osp.exists(path):
        os.makedirs(folder, exist_ok=True)
        torch.hub.download_url_to_file(url, path, progress=sys.stderr.isatty())
    return path


def load_from_torchvision(filename: str, map_location: MapLocation = None) -> Any:
    """Load a model of torchvision by its name."""
    url = _look_up(filename, mmengine_checkpoint.get_torchvision_models())
    return load_from_http(url, map_location)


def load_from_openmmlab(filename: str, map_location: MapLocation = None) -> Any:
    """Load a model of OpenMMLab's zoo by its name, from a URL or a file in ``$MMENGINE_HOME``."""
    scheme, _, model = filename.partition('://')
    model = mmengine_checkpoint.get_deprecated_model_names().get(model, model)
    place = _look_up(f'{scheme}://{model}', mmengine_checkpoint.get_external_models())
    if place.startswith(('http://', 'https://')):
        return load_from_http(place, map_location)
    return load_from_local(osp.join(mmengine_checkpoint._get_mmengine_home(), place), map_location)


def load_from_mmcls(filename: str, map_location: MapLocation = None) -> Any:
    """Load the backbone of a classification model of OpenMMLab's zoo by its name."""
    url = _look_up(filename, mmengine_checkpoint.get_mmcls_models())
    return mmengine_checkpoint._process_mmcls_checkpoint(load_from_http(url, map_location))


def _look_up(filename: str, places: dict[str, str]) -> str:
    model = filename.partition('://')[2]
    if model not in places:
        similar = difflib.get_close_matches(model, places) or sorted(places)[:3]
        raise CheckpointError(f'{filename} is no known model: did you mean {" or ".join(similar)}?')
    return places[model]


def load_from_ceph(filename: str, map_location: MapLocation = None) -> Any:
    """Load an object of an S3 or petrel store."""
    backend = get_file_backend(filename, backend_args=dict(backend='petrel'))
    return load_file(io.BytesIO(backend.get(filename)), map_location, filename)


def load_from_pavi(filename: str, map_location: MapLocation = None) -> Any:
    """Load a model of a pavi store."""
    from pavi import modelcloud

    model = modelcloud.get(filename.partition('://')[2])
    with tempfile.TemporaryDirectory() as folder:
        path = osp.join(folder, 'checkpoint')
        model.download(path)
        return load_file(path, map_location, filename)


_SCHEMES: dict[str, Callable] = {
    '': load_from_local,
    'http://': load_from_http,
    'https://': load_from_http,
    'torchvision://': load_from_torchvision,
    'modelzoo://': load_from_torchvision,
    'open-mmlab://': load_from_openmmlab,
    'openmmlab://': load_from_openmmlab,
    'mmcls://': load_from_mmcls,
    r'(\S+\:)?s3://': load_from_ceph,
    r'(\S+\:)?petrel://': load_from_ceph,
    'pavi://': load_from_pavi,
}


def register_safe_schemes() -> None:
    """Let mmengine read checkpoints by this module: resume, ``load_from``, ``init_cfg``, tests."""
    for prefix, loader in _SCHEMES.items():
        CheckpointLoader.register_scheme(prefix, loader, force=True)
