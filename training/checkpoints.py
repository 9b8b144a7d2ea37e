"""Checkpoints of a stage: whole or not there, the last two kept, and the best weights beside them."""

from __future__ import annotations

import contextlib
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
                state: State = torch.load(self.folder / name, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:  # what a torn file raises is the pickle's and the archive's affair
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
        """The weights that were kept as the best. Raises OSError if there are none."""
        weights: dict[str, Tensor] = torch.load(self.folder / BEST, map_location="cpu", weights_only=True)
        return weights

    @property
    def any(self) -> bool:
        """Whether there is one to go on from."""
        return any((self.folder / name).exists() for name in (LAST, PREVIOUS))

    def remove(self) -> None:
        """Remove all: the stage is done."""
        for name in (LAST, PREVIOUS, BEST):
            (self.folder / name).unlink(missing_ok=True)
            (self.folder / f"{name}.partial").unlink(missing_ok=True)


def _written(state: Any, partial: Path) -> bool:
    try:
        torch.save(state, partial)
        to_disk(partial)
    except (OSError, RuntimeError) as error:  # torch's archive writer reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        tqdm.write(f"{partial.with_suffix('')} was not written, training goes on: {error}")
        return False
    return True
