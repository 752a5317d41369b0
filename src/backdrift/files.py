"""Files that are whole or absent, and folders that one process at a time writes to."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .errors import InputError


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any], *, durable: bool = False) -> None:
    """Let ``write`` fill a file beside ``path``, then rename it into place.

    That is enough against a kill; ``durable`` waits for the disk, against a power cut.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            write(file)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold ``folder`` against other processes; the system lets go of it even after a kill.

    Raises:
        InputError: another process holds it.
    """
    if sys.platform == "win32":  # no advisory locks of this kind there
        yield
        return
    import fcntl

    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"Another process is writing to {str(folder)!r}; wait for it or give another folder."
            ) from error
        yield
