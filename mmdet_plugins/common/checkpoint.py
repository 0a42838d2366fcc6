"""Reading checkpoints without running what they contain.

A checkpoint is a pickle, and a pickle is a program. Every scheme of mmengine's ``CheckpointLoader`` (local files, URLs,
model-zoo names, object stores) is replaced by one that only fetches the file and hands it to :func:`load_file`:
``torch.load(weights_only=True)`` first, then, for what mmengine's own training checkpoints hold besides tensors, an
unpickler with an allow-list. There is no third attempt.
"""

import collections
import io
import os
import os.path as osp
import pickle
import sys
import tempfile
import types
from collections.abc import Callable
from typing import Any, BinaryIO
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.dist import get_dist_info
from mmengine.fileio import get_file_backend
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as mmengine_checkpoint

MapLocation = str | torch.device | Callable | dict | None

_STATISTICS = ('min', 'max', 'current', 'mean')


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged, or that asks for more than data."""


def _statistic(owner: Any, name: Any) -> Callable:
    """Stand in for ``getattr``, by which a ``HistoryBuffer`` pickles its table of statistics."""
    if owner is HistoryBuffer and name in _STATISTICS:
        return getattr(HistoryBuffer, name)
    raise pickle.UnpicklingError(
        f'getattr({getattr(owner, "__name__", type(owner).__name__)}, {name!r})'
    )


def _encode_latin1(text: str, encoding: str) -> bytes:
    """Stand in for ``_codecs.encode``, by which protocol 2 writes bytes."""
    if encoding != 'latin1':
        raise pickle.UnpicklingError(f'_codecs.encode(..., {encoding!r})')
    return text.encode('latin1')


# Each value only builds data from its arguments. The keys are compared whole, so a dotted name leads nowhere.
_ALLOWED: dict[str, Any] = {
    'builtins.getattr': _statistic,
    '_codecs.encode': _encode_latin1,
    'collections.Counter': collections.Counter,
    'collections.OrderedDict': collections.OrderedDict,
    'mmengine.logging.history_buffer.HistoryBuffer': HistoryBuffer,
    'numpy.dtype': np.dtype,
    'numpy.ndarray': np.ndarray,
    'numpy._core.multiarray._reconstruct': np.zeros(0).__reduce__()[0],
    'numpy._core.multiarray.scalar': np.float64(0).__reduce__()[0],
    'torch._utils._rebuild_tensor_v2': torch._utils._rebuild_tensor_v2,
    'torch._utils._rebuild_parameter': torch._utils._rebuild_parameter,
    'torch.Size': torch.Size,
}
_RENAMED = {'__builtin__': 'builtins', 'numpy.core.multiarray': 'numpy._core.multiarray'}
_WITH_STATE = (collections.OrderedDict, HistoryBuffer, np.ndarray, np.dtype)


class _Unpickler(pickle._Unpickler):
    """An unpickler that builds the types of ``_ALLOWED`` and calls nothing else.

    It is Python's own pure implementation, because only there can the opcodes be restricted too: the compiled one calls
    any callable it comes across and lets a file set attributes of shared functions and classes.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        path = f'{_RENAMED.get(module, module)}.{name}'
        if path not in _ALLOWED:
            raise pickle.UnpicklingError(path)
        return _ALLOWED[path]

    def load_reduce(self) -> None:
        self._check_callable(self.stack[-2])
        super().load_reduce()

    def load_newobj(self) -> None:
        self._check_callable(self.stack[-2])
        super().load_newobj()

    def load_build(self) -> None:
        if not isinstance(self.stack[-2], _WITH_STATE):
            raise pickle.UnpicklingError(f'a state for {type(self.stack[-2]).__name__}')
        super().load_build()

    def load_refused(self) -> None:
        raise pickle.UnpicklingError('an opcode that no checkpoint needs')

    @staticmethod
    def _check_callable(target: Any) -> None:
        if not any(target is allowed for allowed in _ALLOWED.values()):
            raise pickle.UnpicklingError(f'a call of {target!r}')

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.BUILD[0]] = load_build
    for _opcode in (
        pickle.INST,
        pickle.OBJ,
        pickle.NEWOBJ_EX,
        pickle.EXT1,
        pickle.EXT2,
        pickle.EXT4,
    ):
        dispatch[_opcode[0]] = load_refused


def _restricted_pickle() -> types.ModuleType:
    """A ``pickle_module`` for ``torch.load``; old formats call its ``load``, new ones its ``Unpickler``."""
    module = types.ModuleType('restricted_pickle')
    module.Unpickler = _Unpickler
    module.load = lambda file, **kwargs: _Unpickler(file, **kwargs).load()
    return module


def load_file(
    file: str | BinaryIO, map_location: MapLocation = None, name: str | None = None
) -> Any:
    """Read a checkpoint that may come from anyone.

    Args:
        file: Path, or a seekable binary file.
        map_location: As in ``torch.load``.
        name: What error messages call the file; its path by default.

    Raises:
        CheckpointError: The file is damaged, is a TorchScript or tar archive, or names something
            outside the allow-list.
    """
    name = name or str(file)
    for kwargs in (
        dict(weights_only=True),
        dict(weights_only=False, pickle_module=_restricted_pickle()),
    ):
        try:
            return _without_code(torch.load(file, map_location=map_location, **kwargs))
        except pickle.UnpicklingError as error:
            reason = error
        except OSError:
            raise
        except Exception as error:
            raise CheckpointError(
                f'{name} cannot be read as a checkpoint ({error}): make or download it again.'
            ) from error
        if not isinstance(file, str):
            file.seek(0)
    raise CheckpointError(
        f'{name} is refused, because it asks for {reason}, which no checkpoint needs: if its maker is to be trusted, '
        'have them save the "state_dict" alone.'
    ) from reason


def _without_code(checkpoint: Any) -> Any:
    """Drop the one entry that mmengine's ``Runner.resume`` would run as Python source."""
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get('meta'), dict):
        checkpoint['meta'].pop('config', None)
    return checkpoint


def load_from_local(filename: str, map_location: MapLocation = None) -> Any:
    """Load a file of this machine."""
    filename = osp.expanduser(filename)
    if not osp.isfile(filename):
        raise FileNotFoundError(f'{filename!r} is not a file: check the path of the checkpoint.')
    return load_file(filename, map_location)


def load_from_http(filename: str, map_location: MapLocation = None) -> Any:
    """Load a URL through torch.hub's cache, which rank 0 fills before the other ranks look into it."""
    rank, world_size = get_dist_info()
    try:
        path = _download(filename) if rank == 0 else None
    finally:
        if world_size > 1:
            torch.distributed.barrier()
    return load_file(path or _download(filename), map_location)


def _download(url: str) -> str:
    """Fetch ``url`` into torch.hub's cache unless it is there; return the path. The file appears whole or not."""
    folder = osp.join(torch.hub.get_dir(), 'checkpoints')
    path = osp.join(folder, osp.basename(urlparse(url).path))
    if not osp.exists(path):
        os.makedirs(folder, exist_ok=True)
        torch.hub.download_url_to_file(url, path, progress=sys.stderr.isatty())
    return path


def load_from_torchvision(filename: str, map_location: MapLocation = None) -> Any:
    """Load a model of torchvision by name."""
    urls = mmengine_checkpoint.get_torchvision_models()
    return load_from_http(_look_up(filename, urls), map_location)


def load_from_openmmlab(filename: str, map_location: MapLocation = None) -> Any:
    """Load a model of OpenMMLab's zoo by name; a name may also stand for a file below ``$MMENGINE_HOME``."""
    prefix, _, model = filename.partition('://')
    model = mmengine_checkpoint.get_deprecated_model_names().get(model, model)
    target = _look_up(f'{prefix}://{model}', mmengine_checkpoint.get_external_models())
    if target.startswith(('http://', 'https://')):
        return load_from_http(target, map_location)
    return load_from_local(osp.join(mmengine_checkpoint._get_mmengine_home(), target), map_location)


def load_from_mmcls(filename: str, map_location: MapLocation = None) -> Any:
    """Load the backbone of an MMClassification model by name."""
    url = _look_up(filename, mmengine_checkpoint.get_mmcls_models())
    return mmengine_checkpoint._process_mmcls_checkpoint(load_from_http(url, map_location))


def _look_up(filename: str, urls: dict[str, str]) -> str:
    scheme, _, model = filename.partition('://')
    if model not in urls:
        raise CheckpointError(
            f'{filename} names no known model: {scheme}:// knows {", ".join(sorted(urls)[:5])}, ...'
        )
    return urls[model]


def load_from_ceph(filename: str, map_location: MapLocation = None) -> Any:
    """Load an object of an S3 or petrel store."""
    backend = get_file_backend(filename, backend_args={'backend': 'petrel'})
    return load_file(io.BytesIO(backend.get(filename)), map_location, filename)


def load_from_pavi(filename: str, map_location: MapLocation = None) -> Any:
    """Load a model of a pavi store."""
    from pavi import modelcloud

    model = modelcloud.get(filename.partition('://')[2])
    with tempfile.TemporaryDirectory() as folder:
        path = osp.join(folder, osp.basename(model.name))
        model.download(path)
        return load_file(path, map_location, filename)


SCHEMES: dict[str, Callable] = {
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
    """Make mmengine's ``CheckpointLoader``, which serves resume, ``init_cfg``, ``load_from`` and testing, use this module."""
    for prefix, loader in SCHEMES.items():
        CheckpointLoader.register_scheme(prefix, loader, force=True)
