"""Where shards lie: a local folder or any address that fsspec reads, and how patiently it is read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import fsspec
from fsspec.core import url_to_fs
from tqdm import tqdm

from training.data.entries import DataError

Value = TypeVar("Value")
# Seconds before the second and the third try of a read that failed.
PAUSES_S = (1.0, 4.0)


class StreamError(DataError):
    """A streamed set that cannot be used, or no longer; one line says why and what to do."""


class Place:
    """A folder of files at a local path or an fsspec address such as `s3://bucket/set` or `memory://set`."""

    def __init__(self, address: str) -> None:
        """Opens the address. Raises StreamError when its protocol is unknown or its package is missing."""
        self.address = address
        try:
            found: tuple[fsspec.AbstractFileSystem, str] = url_to_fs(address)
        except (ImportError, ValueError) as error:
            raise StreamError(f"{address} cannot be opened: {one_line(error)}") from error
        self._files, root = found
        self._root = root.rstrip("/")

    def read(self, name: str) -> bytes:
        """The bytes of a file. Raises OSError: FileNotFoundError where there is none."""
        try:
            data: bytes = self._files.cat_file(f"{self._root}/{name}")
        except FileNotFoundError as error:  # what these say is no more than a path
            raise FileNotFoundError("the file is missing") from error
        except (OSError, MemoryError):
            raise
        except Exception as error:  # file systems have exceptions of their own
            raise OSError(f"{type(error).__name__}: {one_line(error)}") from error
        return data

    def names(self, suffix: str) -> list[str]:
        """The names of the files that end so, sorted; none where there is no folder. Raises StreamError."""
        with _failing(f"{self.address} cannot be listed"):
            try:
                found = self._files.ls(self._root, detail=True)
            except FileNotFoundError:
                return []
            files = [entry["name"] for entry in found if entry["type"] == "file" or self._leads_to_file(entry)]
        names = (file.rpartition("/")[2] for file in files)
        return sorted(name for name in names if name.endswith(suffix) and not name.startswith("."))

    def _leads_to_file(self, entry: Mapping[str, Any]) -> bool:
        return bool(entry.get("islink") and self._files.isfile(entry["name"]))

    def size(self, name: str) -> int | None:
        """The bytes that a file has, or None where there is none. Raises StreamError."""
        with _failing(f"{self.address}/{name} cannot be looked at"):
            try:
                return int(self._files.info(f"{self._root}/{name}")["size"])
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        """Writes a file under another name, then moves it: it is whole or absent. Raises StreamError."""
        partial = f"{self._root}/.{name}.partial"
        with _failing(f"{self.address}/{name} cannot be written"):
            self._files.makedirs(self._root, exist_ok=True)
            self._files.pipe_file(partial, data)
            if type(self._files).mv is not fsspec.AbstractFileSystem.mv:
                self._rename(partial, f"{self._root}/{name}")
            else:  # that one takes * and [ in addresses for patterns
                self._files.cp_file(partial, f"{self._root}/{name}")
                self._files.rm_file(partial)

    def _rename(self, source: str, target: str) -> None:
        """Move a file; some file systems do not move one over another."""
        try:
            self._files.mv(source, target)
        except Exception:  # each has exceptions of its own
            if not self._files.exists(target):
                raise
            self._files.rm_file(target)
            self._files.mv(source, target)

    def remove(self, name: str) -> None:
        """Removes a file where there is one. Raises StreamError."""
        with _failing(f"{self.address}/{name} cannot be removed"), suppress(FileNotFoundError):
            self._files.rm_file(f"{self._root}/{name}")


@contextmanager
def _failing(what: str) -> Iterator[None]:
    """Makes a StreamError of whatever a file system raises: each has exceptions of its own."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise StreamError(f"{what}: {one_line(error)}") from error


def patiently(
    read: Callable[[], Value],
    what: str,
    pauses: Sequence[float] = PAUSES_S,
    wait: Callable[[float], object] = time.sleep,
) -> Value:
    """What `read` returns, tried again after each of the pauses, in seconds, where it raised OSError or ValueError.

    Each new try is told; a missing file is missing at once. Raises what the last try raised.
    """
    for pause in pauses:
        try:
            return read()
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:
            tqdm.write(f"{what}: {one_line(error)}; trying again in {pause:g} s")
        wait(pause)
    return read()


def one_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
