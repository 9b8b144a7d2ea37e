"""The SHA-256 of files, and whether they still are what they were."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from engines.backends.base import EngineError


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file's content, in hex. Raises OSError where it cannot be read."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


Stamps = frozenset[tuple[Path, int, int]]


def stamps_of(folder: Path) -> Stamps:
    """What changes when a folder takes another's place, or a file in it is written: sizes, and times of change.

    Reads no file. Raises OSError where the folder cannot be read.
    """
    found = [(path, path.stat()) for path in (folder, *folder.iterdir())]
    return frozenset((path, status.st_size, status.st_ctime_ns) for path, status in found)


def check_unchanged(files: Iterable[tuple[Path, str]]) -> None:
    """Raise EngineError for a file that no longer has the SHA-256 beside it.

    What is built of files is checked after they were read: another revision may take their place at any time.
    """
    for file, expected in files:
        try:
            found = sha256_of(file)
        except OSError as error:
            raise EngineError(f"{file.name}: cannot be read any more ({error.strerror})") from error
        if found != expected:
            raise EngineError(f"{file.name}: replaced after the bundle was opened (its SHA-256 does not match)")
