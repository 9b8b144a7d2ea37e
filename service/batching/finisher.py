"""Finished rows -> encoded images -> settled jobs, in a thread of its own, beside the next ticks."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from engines.backends.base import DeviceLostError
from engines.images import encode_image, fit
from engines.pipeline import Pipeline
from engines.provenance import describe_image
from engines.tasks import Floats, Pixels
from service.batching.caps import Caps
from service.batching.isolate import BROKEN, Isolator, failures
from service.batching.work import Unit, Work, note_failed_batch, requests_of
from service.jobs import CANCELLED, EXPIRED, Failed, Finished, Job, Outcome, ending
from service.models.registry import Lease
from service.queue.base import JobQueue
from service.safety import Safety
from service.telemetry.logs import describe
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import Tracing, Untraced
from service.threads import Helper

logger = logging.getLogger(__name__)

_UNWRITTEN = Failed("engine", "an image was made, and could not be written as a file")
_PREVIEW_PX = 128
_PREVIEW_QUALITY = 70


class Room:
    """Room for ``most`` images, or for more at once where there are none. They leave it in another thread."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._images = 0
        self._changed = threading.Condition()

    def enter(self, images: int, wait: bool = True) -> bool:
        """Whether there is room for them; waits until there is, if it may."""
        with self._changed:
            entered = self._changed.wait_for(lambda: self._fits(images), None if wait else 0.0)
            self._images += images if entered else 0
            return entered

    def leave(self, images: int) -> None:
        """They are finished."""
        with self._changed:
            self._images -= images
            self._changed.notify()

    def _fits(self, images: int) -> bool:
        return self._images == 0 or self._images + images <= self._most


class Finisher:
    """Decodes, checks, encodes and settles. `submit` blocks while ``room`` images are not finished.

    More of them would only be memory: ticks then wait for the slower decoder.

    ``device_lost`` turns true where decoding finds that the device runs nothing any more.
    """

    def __init__(
        self,
        queue: JobQueue,
        metrics: Metrics,
        room: int,
        clock: Callable[[], float] = time.monotonic,
        safety: Safety | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._queue = queue
        self._safety = safety
        self._tracing = tracing or Untraced()
        self._metrics = metrics
        self._clock = clock
        self._isolator = Isolator[Unit](partial(note_failed_batch, metrics, "decode"), clock, Caps())
        self.device_lost = False
        self._room = Room(room)
        self._helper = Helper("finisher")

    def submit(self, units: Sequence[Unit]) -> None:
        """Take units of one tick, whose rows are done. Their pipeline stays open until they are finished."""
        self._room.enter(len(units))
        self._helper.submit(partial(self._finish, units, units[0].work.lease.again()))

    def preview(self, units: Sequence[Unit]) -> None:
        """Show how far the images of units of one tick are, unless finished ones leave no room for that."""
        if not units or not self._room.enter(len(units), wait=False):
            return
        # Now, as the next tick moves the rows.
        latents = [unit.row.estimate for unit in units if unit.row is not None]
        self._helper.submit(partial(self._preview, units, latents, units[0].work.lease.again()))

    def settle(self, job: Job, outcome: Outcome) -> None:
        """Hand over what became of a job, from any thread; counts it where nothing had before."""
        if (became := self._queue.settle(job.id, outcome)) is not None:
            self._metrics.jobs.labels(ending(became)).inc()

    @property
    def progress(self) -> int | None:
        """See Helper.progress."""
        return self._helper.progress

    def close(self, wait_s: float) -> bool:
        """Finish what was submitted and end the thread. Whether it ended: see Helper.close."""
        return self._helper.close(wait_s)

    def _finish(self, units: Sequence[Unit], lease: Lease) -> None:
        try:
            wanted = self._wanted(units)
            results = self._isolator.run(lease.pipeline.manifest.model, partial(_decode, lease.pipeline), wanted)
            for unit, pixels, failure in zip(wanted, results, failures(results), strict=True):
                if failure is not None:
                    self.device_lost = self.device_lost or isinstance(pixels, DeviceLostError)
                    self._fail(unit.work, failure)
                elif not isinstance(pixels, Exception) and self._wanted([unit]):
                    self._encode_alone(unit, pixels)
        except Exception as error:
            logger.error("finishing failed", extra={"requests": requests_of(units), **describe(error)})
            for unit in units:
                self._fail(unit.work, BROKEN)
        finally:
            lease.release()
            self._room.leave(len(units))

    def _wanted(self, units: Sequence[Unit]) -> list[Unit]:
        """Those that are still to be finished. Settles jobs whose time is over, or that were given up."""
        works = {unit.work.job.id: unit.work for unit in units if not unit.work.over}
        now = self._clock()
        for work in works.values():
            if work.job.deadline <= now:
                self._fail(work, EXPIRED)
        for job_id in self._queue.cancelled([job_id for job_id, work in works.items() if not work.over]):
            self._fail(works[job_id], CANCELLED)
        return [unit for unit in units if not unit.work.over]

    def _preview(self, units: Sequence[Unit], latents: Sequence[Floats], lease: Lease) -> None:
        try:
            for unit, pixels in zip(units, lease.pipeline.decode(latents), strict=True):
                if self._may_be_shown(unit, pixels):
                    self._queue.show(unit.work.job.id, encode_preview(pixels))
        except Exception as error:
            logger.warning("a preview failed", extra={"requests": requests_of(units), **describe(error)})
        finally:
            lease.release()
            self._room.leave(len(units))

    def _may_be_shown(self, unit: Unit, pixels: Pixels) -> bool:
        if self._safety is None:
            return True
        return self._safety.refuse_preview(unit.work.job, unit.task.condition, pixels) is None

    def _encode_alone(self, unit: Unit, pixels: Pixels) -> None:
        """Encode it. Where that fails, no other image does."""
        try:
            self._encode(unit, pixels)
        except Exception as error:
            logger.error("an image cannot be encoded", extra={"requests": requests_of([unit]), **describe(error)})
            self._fail(unit.work, _UNWRITTEN)

    def _encode(self, unit: Unit, pixels: Pixels) -> None:
        work = unit.work
        if self._safety is not None:
            refusal = self._safety.refuse_image(work.job, unit.task.condition, pixels)
            if refusal is not None:
                self._fail(work, refusal)
                return
        output = work.job.output
        text = describe_image(unit.task, work.pipeline.manifest, output.metadata)
        work.images[unit.index] = encode_image(pixels, output.format, quality=output.quality, text=text)
        self._metrics.images.inc()
        if work.complete and not work.over:
            self._settle(work)

    def _settle(self, work: Work) -> None:
        work.over = True
        now = self._clock()
        timings = work.timings(now)
        # Before the answer can be given, so that a request's span is over after those beneath it.
        self._tracing.stage("decode", [work.job], work.denoised, now, len(work.images))
        for stage in ("encode", "denoise", "decode"):
            self._metrics.stage_seconds.labels(stage).observe(getattr(timings, f"{stage}_s"))
        images = tuple(work.images[index] for index in sorted(work.images))
        # Last, as whoever waits for it needs this processor then.
        self.settle(work.job, Finished(images, timings, tuple(work.ticks)))

    def _fail(self, work: Work, failure: Failed) -> None:
        work.over = True
        self.settle(work.job, failure)


def _decode(pipeline: Pipeline, units: Sequence[Unit]) -> Sequence[Pixels]:
    return pipeline.finish([unit.row for unit in units if unit.row is not None])


def encode_preview(pixels: Pixels) -> bytes:
    """A small WebP, at most 128 pixels on a side."""
    height, width, _ = pixels.shape
    scale = min(1.0, _PREVIEW_PX / max(height, width))
    small = fit(pixels, (max(1, round(width * scale)), max(1, round(height * scale))))
    return encode_image(small, "webp", quality=_PREVIEW_QUALITY)
