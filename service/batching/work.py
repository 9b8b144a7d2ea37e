"""What the worker knows of a job it holds: its images in the making, and the time each stage took."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

from engines.paths import Step
from engines.pipeline import Pipeline, Row, Task, ticks
from service.jobs import Failed, Job, Timings
from service.models.catalogue import LoadsEnded, ModelError, UnknownModel
from service.models.registry import Lease, Models
from service.telemetry.logs import describe
from service.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Unit:
    """One image in the making. It has a row once its prompt and its image are encoded."""

    work: Work
    index: int
    task: Task
    row: Row | None = None
    encoding: bool = False

    @property
    def shown(self) -> bool:
        """Whether it is what a preview of its job shows: the first image, in the making."""
        begun = self.row is not None and self.row.ends is not None and not self.row.done
        return self.index == 0 and begun and not self.work.over

    @property
    def group(self) -> Hashable:
        """What decides which units may share a tick, of one that has a row: a bundle has one latent shape."""
        return None if self.row is None else self.group_of(self.row.step)

    def group_of(self, step: Step) -> Hashable:
        """The group in which the unit takes a step."""
        return self.work.job.model, step.graph

    @property
    def remaining(self) -> int:
        """Its steps still to run."""
        return ticks(self.task) if self.row is None else self.row.remaining


@dataclass(slots=True)
class Parked:
    """A job that was taken and waits until its bundle is loaded. ``left``: it had been left to others before."""

    job: Job
    left: bool = False
    loading: Future[None] | None = None

    def failure(self, models: Models) -> Failed | None:
        """Have the bundle loaded; why that failed, or None while it goes on or when it is there."""
        try:
            if self.loading is None:
                self.loading = models.load(self.job.model)
            if self.loading.done():
                finished, self.loading = self.loading, None
                finished.result()
        except LoadsEnded:
            return None  # The worker is about to stop: what it holds is for others, or fails then.
        except UnknownModel:
            message = f"{self.job.model} was replaced or removed before the images were made"
            return Failed("engine", message, retryable=True)
        except ModelError as error:
            return Failed("engine", error.told, retryable=True)
        return None


@dataclass(eq=False, slots=True)
class Work:
    """A job that was taken and is not settled yet.

    The worker's thread writes everything until the last unit is handed to the finisher; then the finisher's
    thread does. ``over`` may be set by either: whoever sees it drops what is left.
    """

    job: Job
    lease: Lease
    units: list[Unit] = field(default_factory=list)
    ticks: list[int] = field(default_factory=list)
    images: dict[int, bytes] = field(default_factory=dict)
    started: float | None = None
    encode_s: float = 0.0
    denoised: float = 0.0
    over: bool = False

    def __post_init__(self) -> None:
        self.units = [Unit(self, index, task) for index, task in enumerate(self.job.tasks)]

    @property
    def pipeline(self) -> Pipeline:
        """What makes its images; open for as long as the worker holds the job."""
        return self.lease.pipeline

    @property
    def progress(self) -> int:
        """The row-ticks of the job that have run."""
        return self.job.cost - sum(unit.remaining for unit in self.units)

    @property
    def complete(self) -> bool:
        """Whether every image is encoded."""
        return len(self.images) == len(self.job.tasks)

    def timings(self, now: float) -> Timings:
        """Seconds in each stage, for a job whose last image was encoded at ``now``."""
        started = self.job.submitted if self.started is None else self.started
        return Timings(
            queue_s=max(0.0, started - self.job.submitted),
            encode_s=self.encode_s,
            denoise_s=max(0.0, self.denoised - started - self.encode_s),
            decode_s=max(0.0, now - self.denoised),
        )


def requests_of(units: Iterable[Unit]) -> list[str]:
    """The ids of the requests that the units belong to, for a log line."""
    return sorted({unit.work.job.request_id for unit in units})


def note_failed_batch(
    metrics: Metrics, stage: Literal["encode", "denoise", "decode"], error: Exception, units: Sequence[Unit]
) -> None:
    """Count a batch of which at least one unit fails, and log it."""
    metrics.batch_failures.labels(type(error).__name__).inc()
    logger.warning("batch failed", extra={"stage": stage, "requests": requests_of(units), **describe(error)})
