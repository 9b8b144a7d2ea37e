"""A job, the unit of the queue: the images of one request, and what became of them. Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from engines.images import ImageFormat
from engines.pipeline import Task, ticks
from engines.provenance import Metadata


@dataclass(frozen=True, slots=True)
class Output:
    """How finished images are encoded; ``quality`` is 1 to 100, None for lossless formats.

    ``metadata`` is how much each file says of how it was made.
    """

    format: ImageFormat
    quality: int | None = None
    metadata: Metadata = "settings"


class Priority(IntEnum):
    """How much a job is in a hurry beside others."""

    LOW = -1
    NORMAL = 0
    HIGH = 1


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """The images of one request: one task each, all made by the same student of ``model``, `name@revision`.

    ``trace`` is the W3C `traceparent` of the request, "" where it is not traced.
    ``submitted`` and ``deadline`` are readings of a monotonic clock in seconds; a queue that crosses hosts
    translates them. ``identity`` recognises a request that was refused and is sent again; "" recognises none.
    """

    id: str
    request_id: str
    tasks: tuple[Task, ...]
    output: Output
    submitted: float
    deadline: float
    model: str = ""
    trace: str = ""
    priority: Priority = Priority.NORMAL
    identity: str = ""

    @property
    def cost(self) -> int:
        """The job's work in row-ticks: the steps that its images run, together."""
        return sum(ticks(task) for task in self.tasks)


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds a job spent in each stage; the stages follow one another, so they add up."""

    queue_s: float
    encode_s: float
    denoise_s: float
    decode_s: float


@dataclass(frozen=True, slots=True)
class Finished:
    """The encoded images in the order of the tasks, and the number of rows in each tick that made them."""

    images: tuple[bytes, ...]
    timings: Timings
    ticks: tuple[int, ...]


FailureReason = Literal["invalid", "expired", "cancelled", "engine", "stopped"]


@dataclass(frozen=True, slots=True)
class Failed:
    """Why there are no images. ``code`` and ``param`` say more, mostly where the reason is ``invalid``."""

    reason: FailureReason
    message: str
    code: str | None = None
    param: str | None = None
    retryable: bool = False


EXPIRED = Failed("expired", "the time limit passed before the images were made")
HOPELESS = Failed("expired", "the images cannot be made within the time limit")
CANCELLED = Failed("cancelled", "the job was cancelled")
STOPPED = Failed("stopped", "the service is shutting down")
LOST = Failed("engine", "the queue lost the job", retryable=True)

Outcome = Finished | Failed


def ending(outcome: Outcome) -> str:
    """What became of a job in one word: done, or the reason why not."""
    return outcome.reason if isinstance(outcome, Failed) else "done"
