"""Results kept on disk under a hash of all that they depend on, so that no result is made twice."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from engines.hashes import sha256_of

Kept = TypeVar("Kept")
Inputs = Mapping[str, Any]

LEFT_BEHIND_S = 86400.0


def hash_of(inputs: Inputs) -> str:
    """A hash of values that JSON can hold, whatever their order."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def hash_of_array(array: NDArray[Any]) -> str:
    """A hash of an array's type, shape and values."""
    digest = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def link(source: Path, target: Path) -> None:
    """A hard link to a file, in place of what is there; a copy where the disk allows no link."""
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def hash_of_files(paths: Sequence[Path]) -> str:
    """A hash of files' contents in their order; of a single one, its SHA-256. Raises FileNotFoundError for none."""
    if not paths:
        raise FileNotFoundError("there are no files to hash")
    hashes = [sha256_of(path) for path in paths]
    return hashes[0] if len(hashes) == 1 else hash_of({"files": hashes})


class Store:
    """A folder of arrays and figures. One that cannot be read, as a broken disk may leave it, is made again."""

    def __init__(self, folder: Path) -> None:
        """Keep results in `folder`, which is made when the first one is."""
        self.folder = folder

    def has_array(self, kind: str, inputs: Inputs) -> bool:
        """Whether an array was kept."""
        return self._path(kind, inputs, "npy").exists()

    def array(self, kind: str, inputs: Inputs, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """The array that was kept for these inputs, or else the one that `make` returns, kept from now on."""
        path = self._path(kind, inputs, "npy")
        kept = _kept(path, _load_array)
        if kept is None:
            kept = make()
            with whole_file(path) as partial, partial.open("wb") as file:
                np.save(file, kept, allow_pickle=False)
        return kept

    def figures(self, kind: str, inputs: Inputs, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The JSON object that was kept for these inputs, or else the one that `make` returns, kept from now on."""
        path = self._path(kind, inputs, "json")
        kept = _kept(path, _load_figures)
        if kept is None:
            text = json.dumps({"inputs": inputs, "figures": make()}, indent=1)
            with whole_file(path) as partial:
                partial.write_text(text)
            kept = json.loads(text)["figures"]
        return kept

    def _path(self, kind: str, inputs: Inputs, suffix: str) -> Path:
        return self.folder / kind / f"{hash_of(inputs)[:20]}.{suffix}"


def _load_array(path: Path) -> NDArray[Any]:
    kept: NDArray[Any] = np.load(path, allow_pickle=False)
    return kept


def _load_figures(path: Path) -> dict[str, Any]:
    kept: dict[str, Any] = json.loads(path.read_text())["figures"]
    return kept


def _kept(path: Path, load: Callable[[Path], Kept]) -> Kept | None:
    """What a file keeps; None if it is not there or cannot be read."""
    if not path.exists():
        return None
    try:
        return load(path)
    except (ValueError, EOFError) as error:
        tqdm.write(f"{path} cannot be read and is made again: {error}")
        return None


def to_disk(path: Path) -> None:
    """Have the disk itself hold a file, or all files of a folder and their names, before anything relies on them."""
    for part in [*sorted(path.rglob("*")), path] if path.is_dir() else [path]:
        number = os.open(part, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def readable(folder: Path) -> None:
    """Whoever may read a folder's config may read its weights, which safetensors writes for their owner alone."""
    for weights in folder.glob("*.safetensors"):
        weights.chmod((folder / "config.json").stat().st_mode)


def sweep(folder: Path) -> None:
    """Remove what killed writers of whole files and folders left in a folder, or in those within, a day ago or more."""
    with suppress(OSError):  # others may be removing what is there, and the next sweep comes
        for partial in folder.rglob(f".*.{'[0-9a-f]' * 8}.partial"):
            newest = max(part.stat().st_mtime for part in (partial, *partial.glob("*")))
            if time.time() - newest > LEFT_BEHIND_S:
                shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes `path` when the writing is done without an error and the disk holds it.

    The name is this writer's own, so that others may write the same file meanwhile: the last one stays. An OSError
    that names no file, as that of a write does not, is given this one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        to_disk(partial)
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if not isinstance(error, OSError) or error.filename is not None:
            raise
        if error.errno is None:  # as numpy's are
            raise OSError(f"{path} was not written: {error}") from error
        error.filename = str(path)
        raise
