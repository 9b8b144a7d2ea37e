"""The loop: take -> tick -> settle. The only place where queue, scheduler and pipeline meet."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from engines.backends.base import DeviceLostError
from engines.pipeline import Pipeline, Row
from service.batching.encoder import Encoded, Encoder
from service.batching.finisher import Finisher
from service.batching.isolate import BROKEN, Isolator, failures
from service.batching.scheduler import Candidate, Plan, Scheduler
from service.batching.work import Parked, Unit, Work, note_failed_batch, requests_of
from service.jobs import CANCELLED, EXPIRED, HOPELESS, STOPPED, Failed, Job
from service.models.registry import Models
from service.queue.base import JobQueue
from service.safety import Safety
from service.telemetry.logs import describe
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import Tracing, Untraced

logger = logging.getLogger(__name__)

_IDLE_WAIT_S = 0.1
_AFTER_ERROR_S = 0.5
_ENCODING_WAIT_S = 0.05
_LAST_TICK_S = 10.0
_LAST_BATCH_S = 30.0
# One that runs, and one that waits.
_FULL_TICKS = 2


class Worker:
    """Runs jobs until stopped, with continuous batching: waiting rows are admitted at every tick.

    Of each bundle it holds two full ticks of images for every number of steps that it had since it last held none. So
    the next tick of each can be full, no bundle waits behind the jobs of another, and what waits longer stays in the
    queue, where its cost bounds admission and another worker could take it. Of a bundle that is not loaded yet it parks
    no more than that, and those that are loaded do not wait for it.

    Where the device is lost the thread ends: the service then fails, and its process with it. What it holds and has not
    settled is for a process that comes after it.
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
        self._finisher = Finisher(queue, metrics, _FULL_TICKS * scheduler.max_rows, clock, safety, tracing)
        self._encoder = Encoder(partial(note_failed_batch, metrics, "encode"), clock)
        self._isolator = Isolator[Unit](partial(note_failed_batch, metrics, "denoise"), clock, scheduler.caps)
        self._device_lost = False
        self._held: dict[str, Work] = {}
        self._parked: dict[str, Parked] = {}
        self._students: dict[str, set[int]] = {}  # of each bundle, by their steps, since it last held none
        self._draining = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)
        self.steps = 0

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

    def stop(self) -> bool:
        """End the thread after the tick that runs. What it holds is for others, or fails where there are none.

        Returns whether it ended: what takes too long, a tick or the work beside it, is left behind with the engines
        that it uses.
        """
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(_LAST_TICK_S)
        if ended := not self._thread.is_alive():
            closed = [part.close(_LAST_BATCH_S) for part in (self._encoder, self._finisher)]
            ended = all(closed)
        self._give_back()
        return ended

    @property
    def progress(self) -> tuple[int | None, ...]:
        """How far its loop, its encoder and its finisher are: a number that stands still where one hangs, or None."""
        return self.steps, self._encoder.progress, self._finisher.progress

    def _give_back(self) -> None:
        if self._queue.durable:
            for work in list(self._held.values()):
                self._let_go(work)
            return
        self._end(list(self._held.values()), STOPPED)
        for parked in list(self._parked.values()):
            self._refuse(parked.job, STOPPED)

    def step(self, wait_s: float = 0.0) -> None:
        """Admit, drop what failed, is cancelled or expired, and run one tick. Waits only when there is nothing."""
        self._drop_failed()
        self._admit(wait_s)
        self._drop_cancelled()
        self._drop_expired()
        self._prepare()
        plan = self._scheduler.plan(self._candidates(), self._clock())
        self._end([self._held[job_id] for job_id in plan.expired], EXPIRED)
        self._end([self._held[job_id] for job_id in plan.hopeless], HOPELESS)
        if plan.batch:
            self._tick(self._units_of(plan))

    def _run(self) -> None:
        self._metrics.worker_up.set(1)
        try:
            while not self._over():
                self.steps += 1
                try:
                    self.step(_IDLE_WAIT_S)
                except Exception as error:
                    fields = {"requests": requests_of(self._units()), **describe(error)}
                    logger.error("the worker's loop failed", extra=fields)
                    self._end(list(self._held.values()), BROKEN)
                    self._stopping.wait(_AFTER_ERROR_S)
            if self._lost:
                self._abandon()
        finally:
            self._metrics.worker_up.set(0)

    @property
    def _lost(self) -> bool:
        return self._device_lost or self._finisher.device_lost

    def _abandon(self) -> None:
        """Settle nothing more: a queue that outlives this process hands its jobs out again."""
        logger.critical("the device is lost", extra={"requests": requests_of(self._units())})
        for work in list(self._held.values()):
            self._let_go(work)
        self._parked.clear()

    def _over(self) -> bool:
        drained = self._draining.is_set() and not self._held and not self._parked
        return drained or self._lost or self._stopping.is_set()

    def _units(self) -> Iterator[Unit]:
        """Every unit that still needs ticks."""
        for work in self._held.values():
            yield from work.units

    def _admit(self, wait_s: float) -> None:
        wait_s = 0.0 if self._held else wait_s
        rooms = self._rooms()  # Also where nothing more is taken: a bundle that is parked for may need another's room.
        if rooms and not self._draining.is_set():
            refused = self._models.refused()
            for job in self._queue.take(rooms, wait_s, refused):
                self._parked[job.id] = Parked(job, left=job.model in refused)
        elif wait_s > 0:  # nothing to do until a bundle is loaded
            self._stopping.wait(wait_s)
        for parked in list(self._parked.values()):
            self._begin(parked)

    def _rooms(self) -> dict[str, int]:
        """How many images of each bundle may be taken; none of one that a full tick waits for already."""
        most = self._scheduler.max_rows
        held = Counter(unit.work.job.model for unit in self._units())
        self._students = {model: students for model, students in self._students.items() if held[model]}
        parked: Counter[str] = Counter()
        for each in self._parked.values():
            parked[each.job.model] += len(each.job.tasks)
        rooms = {
            model: _FULL_TICKS * most * max(1, len(self._students.get(model, ()))) - held[model] - parked[model]
            for model in self._models.takeable()
            if parked[model] < most
        }
        return {model: room for model, room in rooms.items() if room > 0}

    def _begin(self, parked: Parked) -> None:
        """Hold a job whose bundle is loaded; else have it loaded, and look again at the next step."""
        job = parked.job
        if (lease := self._models.take_on(job.model)) is not None:
            del self._parked[job.id]
            self._held[job.id] = Work(job, lease)
            self._students.setdefault(job.model, set()).update(task.steps for task in job.tasks)
        elif job.deadline <= self._clock():
            self._refuse(job, EXPIRED)
        elif (failure := parked.failure(self._models)) is not None:
            if self._passed_on(parked):
                del self._parked[job.id]
            else:
                self._refuse(job, failure)

    def _passed_on(self, parked: Parked) -> bool:
        """Whether others have a job whose bundle does not load here. They may have a copy that does, or more room."""
        job = parked.job
        return not parked.left and job.model in self._models.refused() and self._queue.pass_on(job.id)

    def _introduce(self, unit: Unit, row: Row) -> None:
        """Tell the scheduler what the warm-up of the row's graphs has shown."""
        _, height, width = unit.work.pipeline.manifest.image_shape
        for step in row.path:
            seconds = unit.work.pipeline.seconds.get(step.graph, {})
            self._scheduler.introduce(unit.group_of(step), height * width, seconds)

    def _refuse(self, job: Job, failure: Failed) -> None:
        del self._parked[job.id]
        self._finisher.settle(job, failure)

    def _drop_failed(self) -> None:
        # The finisher may fail a job whose other images still tick here; it is settled already.
        for work in [work for work in self._held.values() if work.over]:
            self._let_go(work)

    def _drop_cancelled(self) -> None:
        for job_id in self._queue.cancelled([*self._held, *self._parked]):
            if job_id in self._parked:
                self._refuse(self._parked[job_id].job, CANCELLED)
            else:
                self._end([self._held[job_id]], CANCELLED)

    def _drop_expired(self) -> None:
        now = self._clock()
        self._end([work for work in self._held.values() if work.job.deadline <= now], EXPIRED)

    def _candidates(self) -> list[Candidate]:
        return [
            Candidate(
                unit.work.job.id,
                unit.index,
                unit.group,
                unit.work.job.submitted,
                unit.work.job.deadline,
                unit.work.job.priority,
                unit.row.remaining,
            )
            for unit in self._units()
            if unit.row is not None
        ]

    def _units_of(self, plan: Plan) -> list[Unit]:
        by_place = {(unit.work.job.id, unit.index): unit for unit in self._units()}
        return [by_place[candidate.job_id, candidate.index] for candidate in plan.batch]

    def _prepare(self) -> None:
        """Have fresh units encoded: beside the ticks of others, or here where nothing can tick before them.

        Those at hand cost nothing.
        """
        for encoded in self._encoder.collect():
            self._take_rows(encoded)
        fresh = [unit for unit in self._units() if unit.row is None and not unit.encoding]
        at_hand = [unit for unit in fresh if unit.work.pipeline.at_hand(unit.task)]
        for units in self._batches(at_hand):
            self._take_rows(self._encoder.encode(units))
        others = [unit for unit in fresh if unit not in at_hand]
        for units in self._batches(others):
            if self._lost:
                return
            if self._encoder.busy or self._can_tick():
                self._encoder.submit(units)
            else:
                self._take_rows(self._encoder.encode(units))
        if not self._can_tick():
            for encoded in self._encoder.collect(_ENCODING_WAIT_S):
                self._take_rows(encoded)

    def _batches(self, units: Iterable[Unit]) -> Iterator[list[Unit]]:
        """Units of one pipeline each, and at most as many as a tick holds."""
        by_pipeline: dict[Pipeline, list[Unit]] = {}
        for unit in units:
            by_pipeline.setdefault(unit.work.pipeline, []).append(unit)
        for alike in by_pipeline.values():
            for start in range(0, len(alike), self._scheduler.max_rows):
                yield alike[start : start + self._scheduler.max_rows]

    def _can_tick(self) -> bool:
        return any(unit.row is not None for unit in self._units())

    def _take_rows(self, encoded: Encoded) -> None:
        for work in dict.fromkeys(unit.work for unit in encoded.units):
            if work.started is None:
                self._begun(work, encoded.began)
            work.encode_s += encoded.seconds
        jobs = list(dict.fromkeys(unit.work.job for unit in encoded.units))
        self._tracing.stage("encode", jobs, encoded.began, encoded.began + encoded.seconds, len(encoded.units))
        for unit, row in zip(encoded.units, encoded.rows, strict=True):
            unit.encoding = False
            if isinstance(row, Row):
                unit.row = row
                self._introduce(unit, row)
        self._end_failed(encoded.units, encoded.rows)

    def _begun(self, work: Work, began: float) -> None:
        job = work.job
        work.started = began
        waited_s, limit_s = max(0.0, began - job.submitted), job.deadline - job.submitted
        self._metrics.queue_seconds.observe(waited_s)
        self._metrics.queue_ratio.observe(waited_s / limit_s if waited_s < limit_s else 1.0)
        self._tracing.stage("queue", [job], job.submitted, began, len(job.tasks))

    def _tick(self, units: Sequence[Unit]) -> None:
        results = self._isolator.run(units[0].group, self._denoise, units)
        self._end_failed(units, results)
        watched = self._queue.progress({unit.work.job.id: unit.work.progress for unit in units})
        self._finisher.preview([unit for unit in units if unit.shown and unit.work.job.id in watched])
        done = [unit for unit in units if unit.row is not None and unit.row.done and not unit.work.over]
        if done:
            self._hand_over(done)

    def _denoise(self, units: Sequence[Unit]) -> list[Row]:
        rows = [unit.row for unit in units if unit.row is not None]
        group = units[0].group
        begin = self._clock()
        units[0].work.pipeline.tick(rows)
        end = self._clock()
        self._scheduler.ticked(group, len(rows), end - begin)
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

    def _end_failed(self, units: Sequence[Unit], results: Sequence[Row | Exception]) -> None:
        if not any(isinstance(result, Exception) for result in results):
            return
        self._device_lost = self._device_lost or any(isinstance(result, DeviceLostError) for result in results)
        for unit, failure in zip(units, failures(results), strict=True):
            if failure is not None and not unit.work.over:
                self._end([unit.work], failure)

    def _end(self, works: Sequence[Work], failure: Failed) -> None:
        for work in works:
            work.over = True
            self._let_go(work)
            self._finisher.settle(work.job, failure)

    def _let_go(self, work: Work) -> None:
        if self._held.pop(work.job.id, None) is not None:
            work.lease.release()
