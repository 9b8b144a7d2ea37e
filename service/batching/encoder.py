"""Fresh units -> rows, in a thread of its own, beside the ticks of others."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from engines.pipeline import Pipeline, Row
from service.batching.caps import Caps
from service.batching.isolate import Isolator
from service.batching.work import Unit
from service.models.registry import Lease
from service.threads import Helper

OnFailure = Callable[[Exception, Sequence[Unit]], None]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Units of one pipeline and the row of each, or why it has none; when that began, and its seconds."""

    units: Sequence[Unit]
    rows: Sequence[Row | Exception]
    began: float
    seconds: float


class Encoder:
    """Encodes at once, or in its thread. What the thread did is collected by the one who submitted it."""

    def __init__(self, on_failure: OnFailure, clock: Callable[[], float] = time.monotonic) -> None:
        """Tell ``on_failure``, in whichever thread, of every batch that failed."""
        self._isolator = Isolator[Unit](on_failure, clock, Caps())
        self._clock = clock
        self._pending = 0
        self._done: queue.SimpleQueue[Encoded] = queue.SimpleQueue()
        self._helper = Helper("encoder")
        self._submitted: list[Future[None]] = []

    @property
    def busy(self) -> bool:
        """Whether anything was submitted and not collected yet."""
        return self._pending > 0

    def encode(self, units: Sequence[Unit]) -> Encoded:
        """Encode units of one pipeline now."""
        return self._encode(units, units[0].work.pipeline)

    def submit(self, units: Sequence[Unit]) -> None:
        """Have units of one pipeline encoded in the thread. The pipeline stays open meanwhile."""
        self._pending += 1
        for unit in units:
            unit.encoding = True
        self._submitted = [each for each in self._submitted if not each.done()]
        self._submitted.append(self._helper.submit(partial(self._run, units, units[0].work.lease.again())))

    def collect(self, wait_s: float = 0.0) -> list[Encoded]:
        """What the thread has done since; waits so long for a first one."""
        found: list[Encoded] = []
        while self.busy:
            try:
                found.append(self._done.get(timeout=wait_s) if wait_s > 0 and not found else self._done.get_nowait())
            except queue.Empty:
                break
            self._pending -= 1
        return found

    @property
    def progress(self) -> int | None:
        """See Helper.progress."""
        return self._helper.progress

    def close(self, wait_s: float) -> bool:
        """End the thread after what it is at; forget what waits. Whether it ended: see Helper.close."""
        for each in self._submitted:
            each.cancel()
        return self._helper.close(wait_s)

    def _run(self, units: Sequence[Unit], lease: Lease) -> None:
        try:
            encoded = self._encode([unit for unit in units if not unit.work.over], lease.pipeline)
        finally:
            lease.release()
        self._done.put(encoded)

    def _encode(self, units: Sequence[Unit], pipeline: Pipeline) -> Encoded:
        began = self._clock()
        model = pipeline.manifest.model
        rows = self._isolator.run(model, lambda some: pipeline.prepare([unit.task for unit in some]), units)
        return Encoded(units, rows, began, self._clock() - began)
