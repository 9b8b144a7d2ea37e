"""A worker hangs when it stands still for too long while its process runs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.batching.watchdog import Watchdog


def test_it_barks_at_what_stands_still_for_longer_than_the_limit_and_at_nothing_else() -> None:
    dog = Watchdog(2.0)
    assert not any(dog.barks(7, now) for now in (0.0, 0.5, 1.0, 1.5, 2.0))
    assert dog.barks(7, 2.5)
    assert not dog.barks(8, 3.0)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60))
def test_it_never_barks_at_what_gets_on(gaps: list[float]) -> None:
    dog, now = Watchdog(0.5), 0.0
    for progress, gap in enumerate(gaps):
        now += gap
        assert not dog.barks(progress, now)


def test_a_process_that_was_stopped_for_hours_is_no_worker_that_hangs() -> None:
    dog = Watchdog(2.0)
    dog.barks(1, 0.0)
    assert not dog.barks(1, 7200.0)
    assert not dog.barks(2, 7200.1)
