"""The jobs of one model that wait, in line. Knows no lock and no door."""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort

from service.jobs import Job
from service.queue.base import rank

_Place = tuple[float, int, Job]


class Line:
    """Those whose deadline is at risk go first, by their deadlines, then the others by age and priority.

    All of them were let in because all can be done by their deadlines: so none is overtaken until it is late. Those
    that are alike in that go in the order in which they came. Adding, removing and finding a position take as long as
    a search, however many wait.
    """

    def __init__(self) -> None:
        """Nobody waits."""
        self._numbers: dict[str, int] = {}
        self._counter = itertools.count()
        self._by_rank: list[_Place] = []
        self._by_deadline: list[_Place] = []

    def __len__(self) -> int:
        """How many wait."""
        return len(self._numbers)

    def add(self, job: Job) -> None:
        """Put a job in line."""
        number = self._numbers[job.id] = next(self._counter)
        insort(self._by_rank, (_rank_of(job), number, job))
        insort(self._by_deadline, (job.deadline, number, job))

    def remove(self, job: Job) -> None:
        """Take a job out of the line."""
        number = self._numbers.pop(job.id)
        del self._by_rank[bisect_left(self._by_rank, (_rank_of(job), number))]
        del self._by_deadline[bisect_left(self._by_deadline, (job.deadline, number))]

    def position(self, job: Job) -> int:
        """How many are before it by age and priority."""
        return bisect_left(self._by_rank, (_rank_of(job), self._numbers[job.id]))

    def due_before(self, time: float) -> list[Job]:
        """Those whose deadline is before that."""
        return [job for _, _, job in self._by_deadline[: bisect_left(self._by_deadline, (time,))]]

    def first(self, room: int, done_by: float) -> list[Job]:
        """Those that fit in a room of so many images, or one; none overtakes another. All can be done by `done_by`."""
        found: list[Job] = []
        left = room
        others = (job for _, _, job in self._by_rank if job.deadline >= done_by)
        for job in itertools.chain(self.due_before(done_by), others):
            images = len(job.tasks)
            if left <= 0 or (found and images > left):
                break
            left -= images
            found.append(job)
        return found


def urgency(job: Job, done_by: float) -> tuple[bool, float]:
    """What jobs that wait are ordered by, where all can be done by `done_by`: the least first."""
    at_risk = job.deadline < done_by
    return not at_risk, job.deadline if at_risk else _rank_of(job)


def _rank_of(job: Job) -> float:
    return rank(job.submitted, job.priority)
