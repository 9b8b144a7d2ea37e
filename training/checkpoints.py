"""Checkpoints of a stage: whole or not there, the last two kept, and the best weights beside them."""

from __future__ import annotations

import contextlib
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from training.store import to_disk

LAST, PREVIOUS, BEST = "checkpoint.pt", "checkpoint-previous.pt", "best.pt"

State = dict[str, Any]


class Checkpoints:
    """The checkpoint files of one stage's folder."""

    def __init__(self, folder: Path) -> None:
        """`folder` is there."""
        self.folder = folder
        self._torn = False

    def save(self, state: State) -> bool:
        """Keep `state` as the last checkpoint, the last one as the one before, unless `load` could not read it.

        A disk that is full loses nothing: it is told, the checkpoints that are there stay, and the answer is False.
        """
        partial = self.folder / f"{LAST}.partial"
        if not _written(state, partial):
            return False
        if (self.folder / LAST).exists() and not self._torn:
            (self.folder / LAST).replace(self.folder / PREVIOUS)
        partial.replace(self.folder / LAST)
        self._torn = False
        return True

    def load(self) -> State | None:
        """The last checkpoint that can be read; None if there is none.

        Raises OSError if there are some and none can be read, since to begin anew would lose what they hold.
        """
        names = [name for name in (LAST, PREVIOUS) if (self.folder / name).exists()]
        for name in names:
            try:
                state: State = _read(self.folder / name, mmap=True)
            except Exception as error:  # what a damaged file raises is the pickle's and the archive's affair
                tqdm.write(f"{self.folder / name} cannot be read: {error}")
                self._torn |= name == LAST
            else:
                return state
        if names:
            raise OSError(
                f"{self.folder}: no checkpoint can be read; remove {', '.join(names)} to begin the stage anew"
            )
        return None

    def save_best(self, weights: dict[str, Tensor]) -> bool:
        """Keep weights as the best; False, as `save` says, if the disk is full."""
        partial = self.folder / f"{BEST}.partial"
        if not _written(weights, partial):
            return False
        partial.replace(self.folder / BEST)
        return True

    def load_best(self) -> dict[str, Tensor]:
        """The weights that were kept as the best. Raises OSError, which says what to do, if they cannot be read."""
        path = self.folder / BEST
        try:
            weights: dict[str, Tensor] = _read(path)
        except Exception as error:  # as in `load`
            raise OSError(
                f"{path} cannot be read: {error}; remove it, and the same command goes on from the last checkpoint, "
                "without the best network up to there"
            ) from error
        return weights

    @property
    def has_best(self) -> bool:
        """Whether weights were kept as the best."""
        return (self.folder / BEST).exists()

    @property
    def any(self) -> bool:
        """Whether there is one to go on from."""
        return any((self.folder / name).exists() for name in (LAST, PREVIOUS))

    def remove(self) -> None:
        """Remove all: the stage is done."""
        for name in (LAST, PREVIOUS, BEST):
            (self.folder / name).unlink(missing_ok=True)
            (self.folder / f"{name}.partial").unlink(missing_ok=True)


def _read(path: Path, *, mmap: bool = False) -> Any:
    """What a file holds. Raises what torch and zipfile do, and OSError for a part that is not as it was written."""
    with zipfile.ZipFile(path) as archive:  # torch compares no sums of what it maps
        damaged = archive.testzip()
    if damaged is not None:
        raise OSError(f"its part {damaged} is damaged")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def _written(state: Any, partial: Path) -> bool:
    try:
        torch.save(state, partial)
        to_disk(partial)
    except (OSError, RuntimeError) as error:  # torch's archive writer reports a full disk as a RuntimeError
        free = _free(partial.parent)  # before what was written of it is removed
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        reason = str(error).partition("\n")[0]
        tqdm.write(f"{partial.with_suffix('')} was not written, training goes on: {free}{reason}")
        return False
    return True


def _free(folder: Path) -> str:
    """How much more its disk holds, for a message; nothing where the disk does not say."""
    try:
        return f"{shutil.disk_usage(folder).free:,} bytes are free on its disk; "
    except OSError:
        return ""
