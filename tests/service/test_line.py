"""The line of one model, against sorting all of it at every question."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.jobs import Job, Priority
from service.queue import line as lines
from service.queue.base import rank
from service.queue.line import Line, urgency
from tests.service.queues import job

SECONDS = st.sampled_from([0.0, 1.0, 2.0, 15.0, 30.0, 31.0, 60.0])


@st.composite
def a_job(draw: st.DrawFn) -> Job:
    """Often like another in age, deadline or rank."""
    made = job("", images=draw(st.integers(1, 4)), priority=draw(st.sampled_from(Priority)))
    return replace(made, submitted=draw(SECONDS), deadline=draw(SECONDS))


def plainly(waiting: list[Job], room: int, done_by: float) -> list[Job]:
    """What fits, of all that wait in the order in which they came, sorted."""
    found: list[Job] = []
    for each in sorted(waiting, key=lambda job: urgency(job, done_by)):
        left = room - sum(len(job.tasks) for job in found)
        if left <= 0 or (found and len(each.tasks) > left):
            break
        found.append(each)
    return found


@given(st.lists(a_job(), max_size=12), st.lists(st.integers(0, 11)), st.integers(1, 9), SECONDS)
def test_it_is_as_if_all_were_sorted(jobs: list[Job], gone: list[int], room: int, done_by: float) -> None:
    line, waiting = Line(), [replace(each, id=str(k)) for k, each in enumerate(jobs)]
    for each in waiting:
        line.add(each)
    for place in gone:
        if place < len(waiting):
            line.remove(waiting.pop(place))
    assert len(line) == len(waiting)
    assert line.first(room, done_by) == plainly(waiting, room, done_by)
    by_age = sorted(waiting, key=lambda job: rank(job.submitted, job.priority))
    assert [line.position(each) for each in by_age] == list(range(len(waiting)))
    assert set(line.due_before(done_by)) == {each for each in waiting if each.deadline < done_by}


def test_one_that_is_larger_than_the_room_goes_alone() -> None:
    line, large, small = Line(), job("large", images=8), job("small", left_s=90.0)
    line.add(large)
    line.add(small)
    assert line.first(4, 0.0) == [large]


def test_those_who_wait_are_not_looked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """By those who come, leave or ask where they are: of tens of thousands that took most of a tick's time."""
    line, looks, rank_of = Line(), Counter[str](), lines._rank_of

    def counted(job: Job) -> float:
        looks[job.id] += 1
        return rank_of(job)

    monkeypatch.setattr(lines, "_rank_of", counted)
    waiting = [job(f"{k}") for k in range(500)]
    for each in waiting:
        line.add(each)
    assert line.first(16, 0.0) == waiting[:16]
    for each in waiting[:16]:
        line.remove(each)
    assert line.position(waiting[16]) == 0
    assert looks.total() == 500 + 16 + 1
