"""Laws of the scheduler: what a tick may hold, and that nothing starves."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.batching.scheduler import Candidate, Scheduler
from service.queue.base import HEAD_START_S

NOW = 100.0

candidates = st.builds(
    Candidate,
    job_id=st.sampled_from("abcdefgh"),
    index=st.integers(0, 7),
    group=st.sampled_from([1, 2, 4]),
    arrived=st.floats(0, NOW),
    deadline=st.floats(NOW - 10, NOW + 100),
    priority=st.integers(-1, 1),
    remaining=st.integers(1, 4),
)
crowds = st.lists(candidates, max_size=40, unique_by=lambda c: (c.job_id, c.index))
sizes = st.integers(1, 16)


def row(
    job_id: str,
    index: int = 0,
    group: int = 4,
    arrived: float = NOW,
    deadline: float = 1e9,
    priority: int = 0,
    remaining: int = 1,
) -> Candidate:
    return Candidate(job_id, index, group, arrived, deadline, priority, remaining)


def warmed(scheduler: Scheduler, seconds: dict[int, float], group: int = 4) -> Scheduler:
    """The scheduler, told what ticks of that group take."""
    scheduler.introduce(group, 1, seconds)
    return scheduler


@given(crowds, sizes)
def test_a_tick_holds_live_rows_of_one_group_up_to_its_size(crowd: list[Candidate], size: int) -> None:
    batch = Scheduler(size).plan(crowd, NOW).batch
    assert len(batch) <= size
    assert len(set(batch)) == len(batch)
    assert set(batch) <= set(crowd)
    assert len({candidate.group for candidate in batch}) <= 1
    assert all(candidate.deadline > NOW for candidate in batch)


@given(crowds, sizes)
def test_something_always_ticks_where_anything_lives_and_no_room_is_wasted(crowd: list[Candidate], size: int) -> None:
    plan = Scheduler(size).plan(crowd, NOW)
    live = [candidate for candidate in crowd if candidate.job_id not in plan.expired]
    assert not plan.hopeless, "nothing was measured yet"
    assert bool(plan.batch) == bool(live)
    if live:
        alike = sum(1 for candidate in live if candidate.group == plan.batch[0].group)
        assert len(plan.batch) == min(size, alike)


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


def test_a_lone_row_ticks_at_once() -> None:
    assert Scheduler(16).plan([row("a")], NOW).batch == (row("a"),)


def test_the_group_of_the_oldest_row_goes_first_and_younger_rows_of_it_ride_along() -> None:
    crowd = [row("young", arrived=3), row("other", group=1, arrived=2), row("old", arrived=1)]
    assert [c.job_id for c in Scheduler(2).plan(crowd, NOW).batch] == ["old", "young"]


def test_a_group_with_work_gets_its_turn_though_another_is_older() -> None:
    scheduler = Scheduler(1)
    crowd = [row(f"old-{k}", arrived=NOW) for k in range(9)] + [row("other", group=1, arrived=NOW + 1)]
    first = [scheduler.plan(crowd, NOW + 2).batch[0].group for _ in range(4)]
    assert first == [4, 1, 4, 1]


def test_priority_is_a_head_start_and_no_more() -> None:
    assert HEAD_START_S == 10.0
    scheduler = Scheduler(1)
    low, high = row("low", arrived=0.0, priority=-1), row("high", arrived=15.0, priority=1)
    assert scheduler.plan([low, high], 16.0).batch == (high,)
    later = row("later", arrived=25.0, priority=1)
    assert scheduler.plan([low, later], 26.0).batch == (low,)


def test_who_is_at_risk_goes_before_who_has_time_and_the_earliest_deadline_first() -> None:
    scheduler = warmed(Scheduler(1), seconds={1: 1.0})
    patient = row("patient", arrived=0.0, deadline=1e6)
    soon, sooner = row("soon", arrived=2.0, deadline=NOW + 2.5), row("sooner", arrived=3.0, deadline=NOW + 1.5)
    assert scheduler.plan([patient, soon, sooner], NOW).batch == (sooner,)


def test_without_pressure_age_decides_and_not_the_deadline() -> None:
    scheduler = warmed(Scheduler(1), seconds={1: 1.0})
    old, young = row("old", arrived=1.0, deadline=1e6), row("young", arrived=2.0, deadline=NOW + 60)
    assert scheduler.plan([old, young], NOW).batch == (old,)


def test_what_cannot_meet_its_deadline_is_given_up_at_once() -> None:
    scheduler = warmed(Scheduler(4), seconds={1: 1.0, 4: 2.0})
    plan = scheduler.plan(
        [row("lost", remaining=4, deadline=NOW + 3.5), row("can", remaining=4, deadline=NOW + 4.5)], NOW
    )
    assert (plan.hopeless, [c.job_id for c in plan.batch]) == ({"lost"}, ["can"])


def test_a_job_is_given_up_whole() -> None:
    scheduler = warmed(Scheduler(4), seconds={1: 1.0})
    plan = scheduler.plan([row("a", 0, remaining=1, deadline=NOW + 2), row("a", 1, remaining=4, deadline=NOW + 2)], NOW)
    assert (plan.hopeless, plan.batch) == ({"a"}, ())


def test_a_wrong_expectation_does_not_give_up_for_ever() -> None:
    scheduler = warmed(Scheduler(4), seconds={1: 100.0})
    for turn in range(100):
        if scheduler.plan([row(f"{turn}", deadline=NOW + 1)], NOW).batch:
            return
    raise AssertionError("nothing ever ran")


def test_no_more_rows_than_pay() -> None:
    stairs = {1: 1.0, 2: 1.2, 4: 2.0, 8: 4.0, 16: 8.0, 32: 16.0}
    scheduler = warmed(Scheduler(32), seconds=stairs)
    crowd = [row(f"{k:02}") for k in range(17)]
    for _ in range(3):
        scheduler.ticked(4, 17, 16.0)
    assert len(scheduler.plan(crowd, NOW).batch) == 16


def test_more_rows_pay_where_an_engine_does_not_pad() -> None:
    scheduler = warmed(Scheduler(32), seconds={rows: 1.0 + rows / 4 for rows in (1, 2, 4, 8, 16, 32)})
    assert len(scheduler.plan([row(f"{k:02}") for k in range(17)], NOW).batch) == 17


def test_a_cap_that_memory_forced_holds_for_its_group_and_for_a_while() -> None:
    scheduler = Scheduler(8)
    crowd = [row(f"{k}") for k in range(9)]
    scheduler.caps.lower(4, 8, NOW)
    assert len(scheduler.plan(crowd, NOW).batch) == 4
    scheduler.caps.lower(4, 1, NOW)
    assert len(scheduler.plan(crowd, NOW).batch) == 1
    scheduler.caps.lower(4, 8, NOW)
    assert len(scheduler.plan(crowd, NOW).batch) == 1
    assert scheduler.caps.of(1, 8, NOW) == 8
    assert len(scheduler.plan(crowd, NOW + 3600).batch) == 8


def test_a_tick_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="room"):
        Scheduler(0)


def test_one_slow_tick_does_not_split_those_after_it() -> None:
    scheduler = warmed(Scheduler(16), seconds={rows: 1.0 + rows / 4 for rows in (1, 2, 4, 8, 16)})
    crowd = [row(f"{k:02}") for k in range(13)]
    for seconds in (12.0, 4.25, 12.0, 12.0):
        scheduler.ticked(4, 13, seconds)
        assert len(scheduler.plan(crowd, NOW).batch) == 13
