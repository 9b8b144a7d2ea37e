"""Finished rows -> encoded images -> settled jobs, in a thread of its own, beside the next ticks."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from engines.backends.base import DeviceLostError
from engines.images import encode_image
from engines.pipeline import Pipeline
from engines.tasks import Pixels
from service.isolate import BROKEN, failures, isolate
from service.jobs import Failed, Finished
from service.logs import describe
from service.metrics import Metrics
from service.models import Lease
from service.queue.base import JobQueue
from service.work import Unit, Work

logger = logging.getLogger(__name__)

# Batches that may wait here. More would only be memory: ticks then wait for the slower decoder.
_BACKLOG = 2


class Finisher:
    """Decodes, encodes and settles. `submit` blocks while the backlog is full.

    ``device_lost`` turns true where decoding finds that the device runs nothing any more.
    """

    def __init__(
        self,
        queue: JobQueue,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._queue = queue
        self._metrics = metrics
        self._clock = clock
        self.device_lost = False
        self._slots = threading.BoundedSemaphore(_BACKLOG)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="finisher")

    def submit(self, units: Sequence[Unit]) -> None:
        """Take units of one tick, whose rows are done. Their pipeline stays open until they are finished."""
        self._slots.acquire()
        self._executor.submit(self._finish, units, units[0].work.lease.again())

    def close(self) -> None:
        """Finish what was submitted and end the thread."""
        self._executor.shutdown(wait=True)

    def _finish(self, units: Sequence[Unit], lease: Lease) -> None:
        try:
            wanted = [unit for unit in units if not unit.work.over]
            results = isolate(partial(_decode, lease.pipeline), wanted, self._failed)
            for unit, pixels, failure in zip(wanted, results, failures(results), strict=True):
                if failure is not None:
                    self.device_lost = self.device_lost or isinstance(pixels, DeviceLostError)
                    self._fail(unit.work, failure)
                elif not isinstance(pixels, Exception):
                    self._encode(unit, pixels)
        except Exception as error:
            logger.error("finishing failed", extra=describe(error))
            for unit in units:
                self._fail(unit.work, BROKEN)
        finally:
            lease.release()
            self._slots.release()

    def _encode(self, unit: Unit, pixels: Pixels) -> None:
        work = unit.work
        output = work.job.output
        work.images[unit.index] = encode_image(pixels, output.format, quality=output.quality)
        self._metrics.images.inc()
        if work.complete and not work.over:
            self._settle(work)

    def _settle(self, work: Work) -> None:
        work.over = True
        timings = work.timings(self._clock())
        images = tuple(work.images[index] for index in sorted(work.images))
        self._queue.settle(work.job.id, Finished(images, timings, tuple(work.ticks)))
        for stage in ("encode", "denoise", "decode"):
            self._metrics.stage_seconds.labels(stage).observe(getattr(timings, f"{stage}_s"))

    def _failed(self, error: Exception, units: Sequence[Unit]) -> None:
        self._metrics.batch_failures.labels(type(error).__name__).inc()
        requests = sorted({unit.work.job.request_id for unit in units})
        logger.warning("batch failed", extra={"stage": "decode", "requests": requests, **describe(error)})

    def _fail(self, work: Work, failure: Failed) -> None:
        work.over = True
        self._queue.settle(work.job.id, failure)


def _decode(pipeline: Pipeline, units: Sequence[Unit]) -> Sequence[Pixels]:
    return pipeline.finish([unit.row for unit in units if unit.row is not None])
