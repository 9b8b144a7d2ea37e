"""What a run tells while it goes: a progress bar, a log in JSON lines, and when a checkpoint is due."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tqdm import tqdm

from training.sections import Optimisation
from training.store import whole_file


@dataclass(frozen=True)
class Pace:
    """How often a run writes: log lines and samples by updates, checkpoints by seconds.

    With infinite seconds a run is not to go on: it saves where it is stopped, and not at its end.
    """

    log_every: int = 20
    sample_every: int = 500
    checkpoint_every_s: float = 120.0

    @property
    def saves_at_end(self) -> bool:
        """Whether a checkpoint is there while the caller keeps what was trained."""
        return math.isfinite(self.checkpoint_every_s)


class Report:
    """The progress of one stage; a context manager. Only the main process writes."""

    def __init__(self, folder: Path, recipe: Optimisation, update: int, pace: Pace, *, main: bool) -> None:
        """Go on after `update`, the last one that is done. `main` says whether this process writes."""
        self.pace, self.main = pace, main
        self._log = _Log(folder / "log.jsonl", recipe.batch_size, update) if main else None
        self._bar = tqdm(
            total=recipe.updates, initial=update, desc=folder.name, unit="update", dynamic_ncols=True,
            disable=None if main else True,
        )  # fmt: skip
        self._last = (update, 0.0, 0, update)
        self._saved_at = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.write()
        self._bar.close()

    def tell(self, update: int, loss: float, norm: float, rate: float, skipped: int, kept: int) -> None:
        """Tell of an update that is done, or was skipped; `kept` is the one whose network is the best so far."""
        self._bar.update()
        if self._log is not None:
            self._log.add(loss, norm)
            self._last = update, rate, skipped, kept
            if update % self.pace.log_every == 0:
                self.write()

    def write(self) -> None:
        """Write a line of the log, if an update was done since the last one."""
        if self._log is not None and self._log.losses:
            self._bar.set_postfix(self._log.write(*self._last))

    @property
    def checkpoint_is_due(self) -> bool:
        """Whether the last one is old enough; the main process decides."""
        return self.main and time.monotonic() - self._saved_at > self.pace.checkpoint_every_s

    def checkpoint_done(self) -> None:
        """Count the time to the next checkpoint from now."""
        self._saved_at = time.monotonic()


def _update_of(line: bytes) -> float:
    """The update of a line of the log; infinity for one that was cut off, or is damaged."""
    try:
        return float(json.loads(line)["update"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _mean(values: list[float]) -> float | None:
    """Over the finite ones; None, as JSON has no other word, if there are none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


class _Log:
    """Averages between two lines of the log, and its rate in images per second."""

    def __init__(self, path: Path, batch_size: int, update: int) -> None:
        self.path, self.batch_size = path, batch_size
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.since, self.update = time.monotonic(), update
        if path.exists():  # Updates that a killed run had done after its last checkpoint are done again.
            lines = path.read_bytes().splitlines(keepends=True)
            with whole_file(path) as partial:
                partial.write_bytes(b"".join(line for line in lines if _update_of(line) <= update))

    def add(self, loss: float, norm: float) -> None:
        self.losses.append(loss)
        self.norms.append(norm)

    def write(self, update: int, rate: float, skipped: int, kept: int) -> dict[str, str]:
        now = time.monotonic()
        loss = _mean(self.losses)
        images_per_s = (update - self.update) * self.batch_size / (now - self.since)
        line = {
            "update": update,
            "images": update * self.batch_size,
            "loss": loss,
            "gradient_norm": _mean(self.norms),
            "learning_rate": rate,
            "skipped": skipped,
            "kept": kept,
            "images_per_s": images_per_s,
        }
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # a full disk is no reason to lose the run
            tqdm.write(f"{self.path} was not written, training goes on: {error}")
        self.losses, self.norms, self.since, self.update = [], [], now, update
        shown = {"loss": "none" if loss is None else f"{loss:.4f}", "images/s": f"{images_per_s:.0f}"}
        return shown | ({"skipped": str(skipped)} if skipped else {})
