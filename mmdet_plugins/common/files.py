"""Files that are either the old one or the complete new one, never a part of it."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


@contextmanager
def atomic_write(path: str | os.PathLike, mode: str = 'w') -> Iterator[IO[Any]]:
    """Open a file that takes the place of ``path`` once it is written out in full.

    The bytes go to a temporary file in the same folder (made if it is missing), which is flushed
    to the disk and renamed when the block ends. If the block raises, or the process is killed, or
    the disk fills up, ``path`` stays what it was.

    Args:
        path: The file to write.
        mode: ``'w'`` (text, UTF-8) or ``'wb'``.
    """
    if mode not in ('w', 'wb'):
        raise ValueError(f"atomic_write takes mode 'w' or 'wb', not {mode!r}.")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f'.{path.name}.', suffix='.tmp', dir=path.parent)
    try:
        with os.fdopen(descriptor, mode, encoding='utf-8' if mode == 'w' else None) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes it private to the user
        os.replace(name, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise
