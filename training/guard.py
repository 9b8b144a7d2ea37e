"""What stands between a long run and its accidents: updates that would do harm, and signals to leave."""

from __future__ import annotations

import math
import signal
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

WINDOW = 100
NEEDED = 20
FEW = 5


class Guard:
    """Decides which updates are skipped: those that are not finite, and those whose loss jumps."""

    def __init__(self, spike: float, limit: int) -> None:
        """A loss above `spike` times the median of the last hundred is a jump; more than `limit` skips are too many."""
        self.spike, self.limit = spike, limit
        self.skipped = 0
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._skips: deque[bool] = deque(maxlen=WINDOW)

    def refuses(self, loss: float, norm: float) -> bool:
        """Whether the update of this loss and gradient norm must be skipped; call it once for each update."""
        bad = not (math.isfinite(loss) and math.isfinite(norm)) or self._jumps(loss)
        if not bad:
            self._losses.append(loss)
        self._skips.append(bad)
        self.skipped += bad
        return bad

    def _jumps(self, loss: float) -> bool:
        return len(self._losses) >= NEEDED and loss > self.spike * median(self._losses)

    @property
    def exhausted(self) -> bool:
        """Whether more of the last hundred updates than the limit were skipped."""
        return sum(self._skips) > self.limit

    @property
    def is_stuck(self) -> bool:
        """Whether the last few updates were all skipped: what is trained has no use for more of them."""
        return all(list(self._skips)[-FEW:])

    @property
    def is_untrained(self) -> bool:
        """Whether every update was skipped."""
        return self.skipped > 0 and not self._losses

    def reason(self, folder: Path, update: int, loss: float, norm: float) -> str:
        """Why the stage in `folder` cannot go on from its last update, skipped for this loss or gradient norm."""
        if not self._losses:  # no learning rate has had a part in it
            return (
                f"{folder.name}: the loss, or its gradient, is not finite from the first update on; that of the last "
                f"is {loss:.3g}, and the gradient's norm {norm:.3g}. Look at the teacher's weights and at the data, "
                f"remove {folder}, and go on"
            )
        if self.exhausted:
            return (
                f"{folder.name}: {self.skipped} updates were skipped, the last one {update}, with a loss of "
                f"{loss:.3g} and a gradient norm of {norm:.3g}. What was trained before is kept: lower the stage's "
                "learning_rate, in the recipe and in the run's recipe.json, and go on"
            )
        return (
            f"{folder.name} ends with updates that were all skipped, the last with a loss of {loss:.3g}, so its "
            "network is not kept: lower the stage's learning_rate, in the recipe and in the run's recipe.json, remove "
            f"{folder}, and go on"
        )

    def pardon(self) -> None:
        """Forget which of the last updates were skipped: whoever goes on from here is counted anew."""
        self._skips.clear()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"skipped": self.skipped, "losses": list(self._losses), "skips": list(self._skips)}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what a checkpoint kept."""
        self.skipped = state["skipped"]
        self._losses = deque(state["losses"], WINDOW)
        self._skips = deque(state["skips"], WINDOW)


class Leave:
    """Whether a signal asked the run to leave."""

    asked = False

    def ask(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        self.asked = True


@contextmanager
def signals() -> Iterator[Leave]:
    """Note SIGTERM and SIGINT instead of dying of them, unless the process ignores them. Other threads note nothing.

    A second SIGINT kills; a second SIGTERM does not, since a launcher passes on what its scheduler has sent to all.
    """
    leave = Leave()
    if threading.current_thread() is not threading.main_thread():
        yield leave
        return
    before = {int(number): signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}

    def ask(number: int, frame: FrameType | None) -> None:
        leave.ask(number, frame)
        if number == signal.SIGINT:
            signal.signal(number, before[number])

    for number in before:
        signal.signal(number, ask)
    try:
        yield leave
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
