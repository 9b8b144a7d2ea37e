"""One process trains in a folder at a time; any number may read there."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from training.errors import TrainingError

LOCK = ".lock"


@contextmanager
def training_alone(folder: Path) -> Iterator[None]:
    """Hold the folder, which is there; where the file system has no locks, or takes no file, hold nothing.

    The kernel lets go of it when the process ends, however it ends. Raises TrainingError if another process has it.
    """
    number = None
    with suppress(OSError):
        number = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        if number is not None:
            _lock(number, folder)
        yield
    finally:
        if number is not None:
            os.close(number)


def _lock(number: int, folder: Path) -> None:
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise TrainingError(
            f"another process is training in {folder}: wait until it is done, or stop it, or choose another folder"
        ) from error
    except OSError:  # the file system has no locks
        return
