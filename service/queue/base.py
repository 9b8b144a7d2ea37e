"""The JobQueue seam: what passes between the API and the workers, and nothing of how it is stored."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from service.jobs import Job, Outcome

Stage = Literal["queued", "running"]


class QueueFull(Exception):
    """The bound on queued cost is reached; ``retry_after_s`` is when there should be room again."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"the queue is full; room is expected in {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class QueueStats:
    """Jobs that wait to be taken: how many, their cost in row-ticks, and the age of the oldest in seconds."""

    depth: int
    cost: int
    oldest_s: float


class JobQueue(Protocol):
    """Jobs wait here, oldest first, bounded by their cost.

    The API side (coroutines) submits, waits and cancels; the worker side (blocking calls from a thread of its
    own) takes and settles. Taking may hand out a job again after its worker died, so settling is idempotent.
    """

    async def submit(self, job: Job) -> None:
        """Accept the job or raise QueueFull. An accepted job is settled or cancelled, never lost."""
        ...

    async def outcome(self, job_id: str) -> Outcome:
        """Wait for the outcome of a submitted job. It can be had once; KeyError for an unknown job."""
        ...

    async def cancel(self, job_id: str) -> Stage | None:
        """Give the job up and forget its outcome. Says how far it had come, None when it was over."""
        ...

    def take(self, rows: int, wait_s: float) -> list[Job]:
        """Take waiting jobs of at most ``rows`` images together, but at least one job where any waits.

        Waits up to ``wait_s`` seconds for a first job and not at all for more. Every job taken must be
        settled, also one that was cancelled meanwhile.
        """
        ...

    def cancelled(self, job_ids: Iterable[str]) -> set[str]:
        """Which of these taken jobs were cancelled since."""
        ...

    def settle(self, job_id: str, outcome: Outcome) -> bool:
        """Hand over the outcome. The first call for a job counts and returns True, later ones do nothing."""
        ...

    def stats(self) -> QueueStats:
        """What waits now."""
        ...
