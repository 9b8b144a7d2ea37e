"""The life of the service: loads the bundle, is ready, drains, stops. Knows nothing of HTTP's details."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from enum import StrEnum
from functools import partial
from pathlib import Path

from engines.manifest import Manifest
from engines.pipeline import Pipeline
from engines.provenance import package_version
from service.batching.scheduler import Scheduler
from service.batching.watchdog import Watchdog
from service.batching.worker import Worker
from service.desk import ClientIsGone, Desk, Result
from service.errors import ApiError, from_failure, model_refusals, too_many_requests
from service.jobs import EXPIRED
from service.models.catalogue import Catalogue, LoadsEnded
from service.models.registry import Lease, Models
from service.queue.base import JobQueue, QueueStats, QueueUnavailable
from service.safety import open_safety
from service.settings import Settings
from service.telemetry.logs import describe
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import Tracing
from service.threads import Helper
from service.tracker import Tracker

logger = logging.getLogger(__name__)

OpenPipeline = Callable[[Settings, Path], Pipeline]

_LOADING_RETRY_S = 2.0


class State(StrEnum):
    """Where in its life the service is. Only a ready one takes requests for images."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    QUEUE_UNAVAILABLE = "queue_unavailable"
    FAILED = "failed"
    STOPPED = "stopped"


class Service:
    """One queue, the bundles that are loaded, one worker unless the role is ``api``, and the gate in front of them."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        queue: JobQueue,
        opener: OpenPipeline,
        tracing: Tracing,
    ) -> None:
        self.settings = settings
        self.metrics = metrics
        self.clock = time.monotonic
        self.inflight = 0
        self.failure: Exception | None = None
        # Without engines a bundle takes next to nothing.
        fronts = settings.role == "api"
        self.models = Models(
            Catalogue.of(settings),
            partial(opener, settings),
            sys.maxsize if fronts else settings.max_model_bytes,
            self._changed,
            owes=queue.owes,
            drain_s=settings.job_timeout_ms / 1000,
            fronts=fronts,
        )
        self._queue = queue
        self._state = State.LOADING
        scheduler = Scheduler(settings.max_batch)
        self._safety = open_safety(settings.safety, metrics, settings.safety_timeout_s)
        self._tracing = tracing
        self._worker = (
            None
            if settings.role == "api"
            else Worker(self.models, queue, scheduler, metrics, safety=self._safety, tracing=self._tracing)
        )
        self._watchdogs = [Watchdog(settings.stall_s) for _ in range(3)]
        self._hangs = False
        self._starter = threading.Thread(target=self._begin, name="starter", daemon=True)
        self._stopping = asyncio.Event()
        self.tracker = Tracker(queue, metrics, self._stopping, settings.drain_timeout_s)
        self.desk = Desk(queue, metrics, self.tracker, self._safety, self._tracing, self._stopping)
        # One thread: decoding an image takes tens of bytes a pixel, and each thread keeps memory of its own.
        self._decoder, self._parser, self._prober = Helper("decoder"), Helper("parser"), Helper("prober")
        self._looking: asyncio.Future[QueueStats] | None = None

    @property
    def state(self) -> State:
        """Where in its life the service is; a worker that died is a failure."""
        return State.FAILED if self.worker_lost else self._state

    @property
    def worker_lost(self) -> bool:
        """Whether a service that was ready has lost its worker, as it does with a device: another process may do."""
        gone = self._hangs or (self._worker is not None and not self._worker.alive)
        return self._state is State.READY and gone

    def watch(self) -> None:
        """See whether the worker gets on; the server asks several times a second. One that hangs is lost."""
        if self._worker is None or self._state is not State.READY or self._hangs:
            return
        now = self.clock()
        looks = zip(self._watchdogs, self._worker.progress, strict=True)
        if any(watchdog.barks(progress, now) for watchdog, progress in looks):
            self._hangs = True
            self.metrics.worker_up.set(0)
            logger.critical("the worker hangs", extra={"stall_s": self.settings.stall_s})

    async def health(self) -> State:
        """The state, or that the queue cannot be reached by a service that is ready otherwise."""
        if self.state is State.READY:
            try:
                await asyncio.shield(self._look())
            except QueueUnavailable:
                return State.QUEUE_UNAVAILABLE
        return self.state

    def _look(self) -> asyncio.Future[QueueStats]:
        """One look at the queue at a time, for all who ask meanwhile: one that hangs takes seconds to be away."""
        if self._looking is None or self._looking.done():
            self._looking = self._prober.result_of(self._queue.stats)
            self._looking.add_done_callback(lambda look: look.cancelled() or look.exception())  # All may have left.
        return self._looking

    def start(self) -> None:
        """Load the default bundle in a thread, so that the service can say meanwhile that it lives."""
        self._starter.start()

    def drain(self) -> None:
        """Take no new requests for images; those in flight go on."""
        if self._state is not State.FAILED:
            self._state = State.DRAINING
        logger.info("draining", extra={"inflight": self.inflight})

    def drained(self) -> bool:
        """Whether a draining service has nothing left to do.

        Once no request is in flight its worker takes no more jobs, and what waits is for other processes. Where there
        are none, it does what waits, and those who ask for a job now and then hear of its end. Those who follow one do
        in any case.
        """
        if self.inflight > 0 or (not self._queue.durable and self._owes_answers()):
            return False
        if self._worker is not None:
            self._worker.drain()
        return self.tracker.following == 0 and (self._worker is None or not self._worker.alive)

    def abandon(self) -> None:
        """Answer every request that still waits with 503."""
        self._stopping.set()

    async def stop(self) -> None:
        """Abandon what still waits and end every thread."""
        self._state = State.STOPPED
        self.abandon()
        await asyncio.to_thread(self._close)
        await self._queue.close()

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """Count a request for images while it is served. Raises ApiError 503 or 429 instead."""
        if self.state is not State.READY:
            self.metrics.rejected.labels("draining" if self._state is State.DRAINING else "not_ready").inc()
            raise self._unavailable()
        if self.inflight >= self.settings.max_inflight:
            self.metrics.rejected.labels("too_many_requests").inc()
            raise too_many_requests()
        self._count(+1)
        try:
            yield
        finally:
            self._count(-1)

    @contextlib.asynccontextmanager
    async def leased(self, name: str | None, deadline: float, client_gone: ClientIsGone) -> AsyncIterator[Pipeline]:
        """The pipeline of that name (None: the default), loaded if need be, and open until the block is left.

        Raises as `Desk.complete` does, and ApiError 404 for a name that there is not, 503 for what cannot be loaded.
        """
        while (lease := self._lease(name)) is None:
            await self.load(name, deadline, client_gone)
            if self.clock() >= deadline:  # However often others have it closed, or replaced, before this has it.
                raise from_failure(EXPIRED)
        try:
            yield lease.pipeline
        finally:
            lease.release()

    async def load(self, name: str | None, deadline: float, client_gone: ClientIsGone | None = None) -> None:
        """`Models.load`, awaited until the deadline. Raises as `leased`."""
        with model_refusals():
            loading = self.models.load(name)
        await self.desk.first(asyncio.wrap_future(loading), deadline, client_gone)

    async def unload(self, name: str, deadline: float) -> None:
        """`Models.unload`, awaited until the deadline. Raises as `leased`."""
        with model_refusals():
            unloading = self.models.unload(name)
        await self.desk.first(asyncio.wrap_future(unloading), deadline)

    def manifest(self, name: str | None) -> Manifest:
        """What the bundle of that name says of itself, loaded or not. Raises ApiError 404 or 503."""
        if (lease := self._lease(name)) is not None:
            lease.release()
            return lease.pipeline.manifest
        with model_refusals():
            return self.models.catalogue.find(name).manifest

    def require_loaded(self) -> None:
        """Raise ApiError 503 until the default bundle has been loaded once."""
        if self._state in (State.LOADING, State.FAILED):
            raise self._unavailable()

    async def decoded(self, call: Callable[[], Result], deadline: float, client_gone: ClientIsGone) -> Result:
        """The result of a call that decodes images, made in a thread.

        Raises as `Desk.complete` does; a call that has not begun by then never does.
        """
        return await self.desk.first(self._decoder.result_of(call), deadline, client_gone)

    async def parsed(self, call: Callable[[], Result], deadline: float) -> Result:
        """The same for a call that is short, and waits for no image to be decoded."""
        return await self.desk.first(self._parser.result_of(call), deadline)

    def _lease(self, name: str | None) -> Lease | None:
        with model_refusals():
            return self.models.lease(name)

    def _owes_answers(self) -> bool:
        return self.tracker.following > 0 or self.tracker.awaited or self._queue.stats().depth > 0

    def _count(self, change: int) -> None:
        self.inflight += change
        self.metrics.inflight.set(self.inflight)

    def _unavailable(self) -> ApiError:
        code, message = {
            State.DRAINING: ("draining", "the service is shutting down"),
            State.STOPPED: ("draining", "the service is shutting down"),
            State.FAILED: ("failed", "the service could not start or lost its worker"),
        }.get(self.state, ("not_ready", "the bundle is loading"))
        return ApiError(503, code, message, retry_after_s=_LOADING_RETRY_S)

    def _begin(self) -> None:
        try:
            self.models.load(None).result()
        except LoadsEnded:
            return
        except Exception as error:
            logger.error("the bundle does not load", extra=describe(error))
            self.failure = error
            self._state = State.FAILED
            return
        if self._worker is not None:
            self._worker.start()
        if self._state is State.LOADING:
            self._state = State.READY
            logger.info("ready", extra={"model": self.models.catalogue.default_name})

    def _changed(self, pipeline: Pipeline, loaded: bool) -> None:
        manifest = pipeline.manifest
        self.metrics.set_model(package_version(), manifest.name, manifest.revision, loaded)
        if loaded and self._worker is not None and (speed := pipeline.rows_per_second) > 0:
            self._queue.expect(manifest.model, speed)

    def _close(self) -> None:
        # Of what they are at nobody awaits the result any more, and it may hang.
        for helper in (self._decoder, self._parser, self._prober, self.desk):
            helper.close()
        self.models.cancel_loads()
        if self._starter.ident is not None:
            self._starter.join()
        ended = self._worker is None or self._worker.stop()
        if self._safety is not None:
            self._safety.close()
        if ended:  # Engines wait for what runs on them.
            self.models.close()
        self._tracing.close()
