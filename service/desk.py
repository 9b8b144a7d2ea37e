"""Takes jobs to the queue and waits for their images, no longer than anyone still wants them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from service.errors import ApiError, from_failure, idempotency_conflict, model_refusals, queue_unavailable
from service.jobs import EXPIRED, LOST, STOPPED, FailureReason, Finished, Job, Outcome
from service.queue.base import JobQueue, Keep, KeyConflict, QueueFull, QueueUnavailable, Status
from service.safety import Safety
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import Tracing
from service.threads import Helper
from service.tracker import Tracker

Result = TypeVar("Result")
ClientIsGone = Callable[[], Awaitable[None]]


class ClientGone(Exception):
    """The client closed its connection before it had its answer."""


_MOST_TOLD_LOST = 1024


class Desk:
    """Where requests for images hand in their jobs. Its methods belong to one event loop."""

    def __init__(
        self,
        queue: JobQueue,
        metrics: Metrics,
        tracker: Tracker,
        safety: Safety | None,
        tracing: Tracing,
        stopping: asyncio.Event,
    ) -> None:
        """``stopping`` is set when the service answers nothing more."""
        self._queue = queue
        self._metrics = metrics
        self._tracker = tracker
        self._safety = safety
        self._tracing = tracing
        self._stopping = stopping
        self._screener = Helper("screener")
        self._background: set[asyncio.Task[None]] = set()
        self._stopped: asyncio.Future[Any] | None = None
        self._told_lost: deque[str] = deque(maxlen=_MOST_TOLD_LOST)

    def close(self) -> None:
        """End its thread."""
        self._screener.close()

    async def complete(self, job: Job, client_gone: ClientIsGone) -> Finished:
        """Queue the job and wait for its images.

        ``client_gone`` returns when the client closes its connection: then the job is cancelled and ClientGone
        raised. Raises ApiError where there are no images: 422 refused by the safety check, 429 queue full,
        504 deadline, 503 stopped or no queue, 500.
        """
        await self.accept(job)
        outcome = await self._wait(job, client_gone)
        if isinstance(outcome, Finished):
            return outcome
        raise self._lost(job.id) if outcome == LOST else from_failure(outcome)

    async def completed(self, job_id: str, deadline: float, client_gone: ClientIsGone) -> tuple[Status, Finished]:
        """Wait for the images of a job that is kept, which goes on when its client is gone. Raises as `complete`."""
        try:
            status = await self.first(asyncio.ensure_future(self._tracker.over(job_id)), deadline, client_gone)
        except KeyError:
            raise self._lost(job_id) from None
        if isinstance(status.outcome, Finished):
            return status, status.outcome
        raise from_failure(status.outcome or STOPPED)

    async def accept(self, job: Job, keep: Keep | None = None) -> str:
        """Queue the job, unless the safety check refuses it.

        Returns its id, or that of the job which has its key. Raises ApiError 422, 429, 500, 503 or 504.
        """
        await self._screen(job)
        job = replace(job, submitted=time.monotonic(), trace=self._tracing.current())
        submitting = asyncio.ensure_future(self._queue.submit(job, keep))
        with self._refusals():
            try:
                return await self.first(asyncio.shield(submitting), job.deadline)
            except (ApiError, asyncio.CancelledError) as error:
                self._in_the_background(self._withdraw(job, keep, submitting, _reason(error)))
                raise

    async def holder(self, keep: Keep, deadline: float) -> str | None:
        """The job that its key names for the same request, if there is one and the queue says so in time."""
        try:
            return await self.first(asyncio.ensure_future(self._queue.holder(keep)), deadline)
        except (ApiError, KeyConflict, QueueUnavailable):
            return None

    async def ask(self, job: Job, keep: Keep | None = None) -> None:
        """Raise ApiError 422, 429, 503 or 504 where the queue would not take the job now; its images may be missing."""
        with self._refusals():
            await self.first(asyncio.ensure_future(self._queue.ask(job, keep)), job.deadline)

    async def first(
        self, wanted: asyncio.Future[Result], deadline: float, client_gone: ClientIsGone | None = None
    ) -> Result:
        """What is wanted, unless before it the client goes, the service stops, or the deadline passes.

        Raises ClientGone, and ApiError 503 or 504.
        """
        if self._stopped is None:
            self._stopped = asyncio.ensure_future(self._stopping.wait())
        gone = None if client_gone is None else asyncio.ensure_future(client_gone())
        own: list[asyncio.Future[Any]] = [wanted] if gone is None else [wanted, gone]
        try:
            left_s = max(0.0, deadline - time.monotonic())
            await asyncio.wait([*own, self._stopped], timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if wanted.done():
                return _result(wanted)
            if gone is not None and gone.done():
                raise ClientGone
            raise from_failure(STOPPED if self._stopping.is_set() else EXPIRED)
        finally:
            for future in own:
                future.cancel()

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        """What the queue raises at its door, as ApiError."""
        try:
            yield
        except KeyConflict as error:
            raise idempotency_conflict(error) from error
        except QueueFull as error:
            self._metrics.rejected.labels("queue_full").inc()
            raise ApiError(429, "queue_full", str(error), retry_after_s=error.retry_after_s) from error
        except QueueUnavailable as error:
            self._metrics.rejected.labels("queue_unavailable").inc()
            raise queue_unavailable() from error

    async def _screen(self, job: Job) -> None:
        """Ask the safety check, where there is one, in a thread."""
        if self._safety is None:
            return
        asked = self._screener.result_of(partial(self._safety.refuse_prompt, job))
        if (refusal := await self.first(asked, job.deadline)) is not None:
            raise from_failure(refusal)

    def _lost(self, job_id: str) -> ApiError:
        """What is told of a job that the queue lost, which nobody else can count; several may follow one."""
        if job_id not in self._told_lost:
            self._told_lost.append(job_id)
            self._metrics.jobs.labels(LOST.reason).inc()
        return from_failure(LOST)

    async def _wait(self, job: Job, client_gone: ClientIsGone) -> Outcome:
        outcome = asyncio.ensure_future(self._queue.outcome(job.id))
        try:
            return await self.first(outcome, job.deadline, client_gone)
        except BaseException as error:
            await self._cancel(job, _reason(error))
            raise

    async def _withdraw(
        self, job: Job, keep: Keep | None, submitting: asyncio.Future[str], reason: FailureReason
    ) -> None:
        """Cancel what nobody waits for any more, once the queue has it: before, it might come after its cancellation.

        A job that is kept goes on: who asks again gets its images.
        """
        try:
            await submitting
        except (KeyConflict, QueueFull, QueueUnavailable):
            return
        if keep is None:
            await self._cancel(job, reason)

    def _in_the_background(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _cancel(self, job: Job, reason: FailureReason) -> None:
        try:
            stage = await self._queue.cancel(job.id)
        except QueueUnavailable:
            return  # Its deadline will end it.
        if stage is None:
            return
        self._metrics.jobs.labels(reason).inc()
        if reason == "cancelled":
            self._metrics.cancelled.labels(stage).inc()


def _result(done: asyncio.Future[Result]) -> Result:
    with model_refusals():
        return done.result()


def _reason(error: BaseException) -> FailureReason:
    """Why a job is given up whose wait ended so."""
    if isinstance(error, ClientGone):
        return "cancelled"
    late = isinstance(error, ApiError) and error.status == 504
    return "expired" if late else "stopped"
