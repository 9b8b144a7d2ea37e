"""Laws of the scheduler: what a tick may hold, and that nothing starves."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.scheduler import Candidate, Scheduler

NOW = 100.0

candidates = st.builds(
    Candidate,
    job_id=st.sampled_from("abcdefgh"),
    index=st.integers(0, 7),
    group=st.sampled_from([1, 2, 4]),
    arrived=st.floats(0, NOW),
    deadline=st.floats(NOW - 10, NOW + 100),
)
crowds = st.lists(candidates, max_size=40, unique_by=lambda c: (c.job_id, c.index))
sizes = st.integers(1, 16)


def row(job_id: str, index: int = 0, group: int = 4, arrived: float = 0.0) -> Candidate:
    return Candidate(job_id, index, group, arrived, deadline=1e9)


@given(crowds, sizes)
def test_a_tick_holds_live_rows_of_one_group_up_to_its_size(crowd: list[Candidate], size: int) -> None:
    batch = Scheduler(size).plan(crowd, NOW).batch
    assert len(batch) <= size
    assert len(set(batch)) == len(batch)
    assert set(batch) <= set(crowd)
    assert len({candidate.group for candidate in batch}) <= 1
    assert all(candidate.deadline > NOW for candidate in batch)


@given(crowds, sizes)
def test_the_oldest_live_row_always_ticks_and_no_room_is_wasted(crowd: list[Candidate], size: int) -> None:
    batch = Scheduler(size).plan(crowd, NOW).batch
    live = [candidate for candidate in crowd if candidate.deadline > NOW]
    if not live:
        assert batch == ()
        return
    assert min(candidate.arrived for candidate in live) == batch[0].arrived
    alike = sum(1 for candidate in live if candidate.group == batch[0].group)
    assert len(batch) == min(size, alike)


@given(crowds, sizes, st.randoms())
def test_the_plan_does_not_depend_on_the_order_of_the_candidates(
    crowd: list[Candidate], size: int, random: Random
) -> None:
    shuffled = sorted(crowd, key=lambda _: random.random())
    assert Scheduler(size).plan(crowd, NOW) == Scheduler(size).plan(shuffled, NOW)


@given(crowds)
def test_expired_jobs_are_named(crowd: list[Candidate]) -> None:
    expired = Scheduler(4).plan(crowd, NOW).expired
    assert expired == {candidate.job_id for candidate in crowd if candidate.deadline <= NOW}


@dataclass
class Moving:
    candidate: Candidate
    remaining: int


@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from([1, 2, 4])), min_size=1, max_size=60), sizes)
def test_every_row_is_done_after_at_most_the_ticks_of_all_rows_before_it(
    arrivals: list[tuple[int, int]], size: int
) -> None:
    """Continuous arrivals: a row waits for older work only, whatever comes after it."""
    scheduler = Scheduler(size)
    incoming = sorted(
        (Moving(row(f"job-{k:03}", 0, steps, float(at)), steps) for k, (at, steps) in enumerate(arrivals)),
        key=lambda moving: (moving.candidate.arrived, moving.candidate.job_id),
    )
    done_at: dict[str, int] = {}
    for tick in range(10_000):
        present = [m for m in incoming if m.remaining and m.candidate.arrived <= tick]
        batch = {c.job_id for c in scheduler.plan([m.candidate for m in present], float(tick)).batch}
        for moving in present:
            if moving.candidate.job_id in batch:
                moving.remaining -= 1
                if moving.remaining == 0:
                    done_at[moving.candidate.job_id] = tick
        if len(done_at) == len(incoming):
            break
    older_work = 0
    for moving in incoming:
        older_work += moving.candidate.group  # type: ignore[operator]
        assert done_at[moving.candidate.job_id] < moving.candidate.arrived + older_work


def test_a_lone_row_ticks_at_once() -> None:
    assert Scheduler(16).plan([row("a")], NOW).batch == (row("a"),)


def test_the_group_of_the_oldest_row_goes_first_and_younger_rows_of_it_ride_along() -> None:
    crowd = [row("young", arrived=3), row("other", group=1, arrived=2), row("old", arrived=1)]
    assert [c.job_id for c in Scheduler(2).plan(crowd, NOW).batch] == ["old", "young"]


def test_a_tick_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="room"):
        Scheduler(0)
