"""The JobQueue seam: what passes between the API and the workers, and nothing of how it is stored."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from service.jobs import Job, Outcome

Stage = Literal["queued", "running"]

RATE_MEMORY_S = 10.0
# A step of priority counts as so much age: so nothing is overtaken for ever.
HEAD_START_S = 10.0
_RETRY_AFTER_S = (1.0, 60.0)


def retry_after_s(waiting_cost: float, cost_per_s: float) -> float:
    """When a full queue should have room, at the rate at which cost is taken off it (0: not known yet)."""
    shortest, longest = _RETRY_AFTER_S
    expected = waiting_cost / cost_per_s if cost_per_s > 0 else shortest
    return min(max(expected, shortest), longest)


class QueueFull(Exception):
    """The bound on queued cost is reached; ``retry_after_s`` is when there should be room again."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"the queue is full; room is expected in {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s


class QueueUnavailable(Exception):
    """The queue cannot be reached now. Whether it has what was being submitted is not known."""

    def __init__(self) -> None:
        super().__init__("the queue cannot be reached")


@dataclass(frozen=True, slots=True)
class QueueStats:
    """Jobs that wait to be taken: how many, their cost in row-ticks, and the age of the oldest in seconds."""

    depth: int
    cost: int
    oldest_s: float


class JobQueue(Protocol):
    """Jobs wait here, oldest first, bounded by their cost.

    The API side (coroutines) submits, waits and cancels; the worker side (blocking calls from threads of its
    own) takes and settles. Taking may hand out a job again after its worker died, so settling is idempotent.

    While the queue is away, ``submit``, ``cancel`` and ``stats`` raise QueueUnavailable and ``outcome`` goes on
    waiting. The worker side never fails then: there is nothing to take, and outcomes are handed over later.
    """

    async def submit(self, job: Job) -> None:
        """Accept the job, or raise QueueFull, also where it would come too late behind the others.

        An accepted job is settled or cancelled, never lost.
        """
        ...

    async def outcome(self, job_id: str) -> Outcome:
        """Wait for the outcome of a submitted job. It can be had once; KeyError for an unknown job."""
        ...

    async def cancel(self, job_id: str) -> Stage | None:
        """Give the job up and forget its outcome. Says how far it had come, None when it was over."""
        ...

    def take(self, models: Collection[str], rows: int, wait_s: float) -> list[Job]:
        """Take waiting jobs for ``models``: of at most ``rows`` images together, but at least one where any waits.

        Waits up to ``wait_s`` seconds for a first job and not at all for more. Every job taken must be
        settled, also one that was cancelled meanwhile. A job that is handed out again comes alone, and nothing
        comes beside it until it is settled: it may have been what its worker died of.
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

    async def close(self) -> None:
        """Let go of what the queue holds open. Nothing is called afterwards."""
        ...
