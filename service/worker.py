"""The loop: take -> tick -> settle. The only place where queue, scheduler and pipeline meet."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from engines.pipeline import Row
from service.finisher import Finisher
from service.isolate import BROKEN, failures, isolate
from service.jobs import Failed, Job
from service.logs import describe
from service.metrics import Metrics
from service.models import Models
from service.queue.base import JobQueue
from service.safety import Safety
from service.scheduler import Candidate, Plan, Scheduler
from service.tracing import Tracing, Untraced
from service.work import Parked, Unit, Work, requests_of

logger = logging.getLogger(__name__)

_IDLE_WAIT_S = 0.1
_AFTER_ERROR_S = 0.5


class Worker:
    """Runs jobs until stopped, with continuous batching: waiting rows are admitted at every tick.

    It holds at most two full ticks of images. So rows of another student can fill the next tick, and what
    waits longer stays in the queue, where its cost bounds admission and another worker could take it.
    """

    def __init__(
        self,
        models: Models,
        queue: JobQueue,
        scheduler: Scheduler,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        *,
        safety: Safety | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._models = models
        self._queue = queue
        self._scheduler = scheduler
        self._metrics = metrics
        self._tracing = tracing or Untraced()
        self._clock = clock
        self._finisher = Finisher(queue, metrics, clock, safety, tracing)
        self._held: dict[str, Work] = {}
        self._parked: dict[str, Parked] = {}
        self._draining = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def drain(self) -> None:
        """Take no more jobs; the thread ends when the last one held has run its ticks."""
        self._draining.set()

    def stop(self) -> None:
        """End the thread after the tick that runs. What it holds is for others, or fails where there are none."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._finisher.close()
        if self._queue.durable:
            for work in list(self._held.values()):
                self._let_go(work)
            return
        self._end(list(self._held.values()), _STOPPED)
        for parked in list(self._parked.values()):
            self._refuse(parked.job, _STOPPED)

    def step(self, wait_s: float = 0.0) -> None:
        """Admit, drop what failed, is cancelled or expired, and run one tick. Waits only when there is nothing."""
        self._drop_failed()
        self._admit(wait_s)
        self._drop_cancelled()
        plan = self._scheduler.plan(self._candidates(), self._clock())
        self._end([self._held[job_id] for job_id in plan.expired], _EXPIRED)
        units = self._started(plan)
        if units:
            self._tick(units)

    def _run(self) -> None:
        self._metrics.worker_up.set(1)
        try:
            while not self._over():
                try:
                    self.step(_IDLE_WAIT_S)
                except Exception as error:
                    fields = {"requests": requests_of(self._units()), **describe(error)}
                    logger.error("the worker's loop failed", extra=fields)
                    self._end(list(self._held.values()), BROKEN)
                    self._stopping.wait(_AFTER_ERROR_S)
        finally:
            self._metrics.worker_up.set(0)

    def _over(self) -> bool:
        return self._stopping.is_set() or (self._draining.is_set() and not self._held and not self._parked)

    def _units(self) -> Iterator[Unit]:
        """Every unit that still needs ticks."""
        for work in self._held.values():
            yield from work.units

    def _admit(self, wait_s: float) -> None:
        wait_s = 0.0 if self._held else wait_s
        rows = sum(1 for _ in self._units()) + sum(len(parked.job.tasks) for parked in self._parked.values())
        room = 2 * self._scheduler.max_rows - rows
        if room > 0 and not self._draining.is_set():
            for job in self._queue.take(self._models.takeable(), room, wait_s):
                self._parked[job.id] = Parked(job)
        elif wait_s > 0:  # nothing to do until a bundle is loaded
            self._stopping.wait(wait_s)
        for parked in list(self._parked.values()):
            self._begin(parked)

    def _begin(self, parked: Parked) -> None:
        """Hold a job whose bundle is loaded; else have it loaded, and look again at the next step."""
        job = parked.job
        if (lease := self._models.lease(job.model, retiring=True)) is not None:
            del self._parked[job.id]
            self._held[job.id] = Work(job, lease)
        elif job.deadline <= self._clock():
            self._refuse(job, _EXPIRED)
        elif (failure := parked.failure(self._models)) is not None:
            self._refuse(job, failure)

    def _refuse(self, job: Job, failure: Failed) -> None:
        del self._parked[job.id]
        self._queue.settle(job.id, failure)

    def _drop_failed(self) -> None:
        # The finisher may fail a job whose other images still tick here; it is settled already.
        for work in [work for work in self._held.values() if work.over]:
            self._let_go(work)

    def _drop_cancelled(self) -> None:
        for job_id in self._queue.cancelled([*self._held, *self._parked]):
            if job_id in self._parked:
                self._refuse(self._parked[job_id].job, _CANCELLED)
            else:
                self._end([self._held[job_id]], _CANCELLED)

    def _candidates(self) -> list[Candidate]:
        # A bundle has one latent shape: the model and the number of steps tell groups apart.
        return [
            Candidate(
                unit.work.job.id,
                unit.index,
                (unit.work.job.model, unit.task.steps),
                unit.work.job.submitted,
                unit.work.job.deadline,
            )
            for unit in self._units()
        ]

    def _started(self, plan: Plan) -> list[Unit]:
        """The units of the plan, with a row each; those that cannot start fail."""
        by_place = {(unit.work.job.id, unit.index): unit for unit in self._units()}
        units = [by_place[candidate.job_id, candidate.index] for candidate in plan.batch]
        self._prepare([unit for unit in units if unit.row is None])
        return [unit for unit in units if not unit.work.over]

    def _prepare(self, fresh: Sequence[Unit]) -> None:
        if not fresh:
            return
        begin = self._clock()
        works = list(dict.fromkeys(unit.work for unit in fresh))
        for work in works:
            if work.started is None:
                work.started = begin
                self._metrics.queue_seconds.observe(max(0.0, begin - work.job.submitted))
                self._tracing.stage("queue", [work.job], work.job.submitted, begin, len(work.job.tasks))
        results = isolate(_encode, fresh, lambda error, units: self._failed("encode", error, units))
        elapsed = self._clock() - begin
        self._tracing.stage("encode", [work.job for work in works], begin, begin + elapsed, len(fresh))
        for work in works:
            work.encode_s += elapsed
        for unit, row in zip(fresh, results, strict=True):
            if isinstance(row, Row):
                unit.row = row
        self._end_failed(fresh, results)

    def _tick(self, units: Sequence[Unit]) -> None:
        results = isolate(self._denoise, units, lambda error, batch: self._failed("denoise", error, batch))
        self._end_failed(units, results)
        watched = self._queue.progress({unit.work.job.id: unit.work.progress for unit in units})
        self._finisher.preview([unit for unit in units if unit.shown and unit.work.job.id in watched])
        done = [unit for unit in units if unit.row is not None and unit.row.done and not unit.work.over]
        if done:
            self._hand_over(done)

    def _denoise(self, units: Sequence[Unit]) -> list[Row]:
        rows = [unit.row for unit in units if unit.row is not None]
        begin = self._clock()
        units[0].work.pipeline.tick(rows)
        end = self._clock()
        self._metrics.tick_seconds.observe(end - begin)
        self._metrics.tick_rows.observe(len(rows))
        works = list(dict.fromkeys(unit.work for unit in units))
        self._tracing.stage("tick", [work.job for work in works], begin, end, len(rows))
        for work in works:
            work.ticks.append(len(rows))
        return rows

    def _hand_over(self, done: Sequence[Unit]) -> None:
        now = self._clock()
        for unit in done:
            work = unit.work
            work.units.remove(unit)
            if not work.units:
                work.denoised = now
        self._finisher.submit(done)
        for work in {unit.work for unit in done if not unit.work.units}:
            self._let_go(work)

    def _failed(self, stage: Literal["encode", "denoise"], error: Exception, units: Sequence[Unit]) -> None:
        self._metrics.batch_failures.labels(type(error).__name__).inc()
        fields = {"stage": stage, "requests": requests_of(units), **describe(error)}
        logger.warning("batch failed", extra=fields)

    def _end_failed(self, units: Sequence[Unit], results: Sequence[Row | Exception]) -> None:
        for unit, failure in zip(units, failures(results), strict=True):
            if failure is not None and not unit.work.over:
                self._end([unit.work], failure)

    def _end(self, works: Sequence[Work], failure: Failed) -> None:
        for work in works:
            work.over = True
            self._let_go(work)
            self._queue.settle(work.job.id, failure)

    def _let_go(self, work: Work) -> None:
        if self._held.pop(work.job.id, None) is not None:
            work.lease.release()


def _encode(units: Sequence[Unit]) -> list[Row]:
    return units[0].work.pipeline.prepare([unit.task for unit in units])


_EXPIRED = Failed("expired", "the time limit passed before the images were made")
_CANCELLED = Failed("cancelled", "the job was cancelled")
_STOPPED = Failed("stopped", "the service is shutting down")
