"""Laws of the fitted latency: it finds the line, follows it, and is neither negative nor unbounded."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.batching.latency import Latency

SIZES = (1, 2, 4, 8, 16)
slopes = st.floats(1e-5, 1.0)
offsets = st.floats(0.0, 1.0)
ticks = st.lists(st.tuples(st.integers(1, 64), st.floats(0, 10)), min_size=1, max_size=60)


def line(a: float, b: float) -> dict[int, float]:
    return {rows: a * rows + b for rows in SIZES}


@given(slopes, offsets)
def test_a_warm_up_gives_the_line(a: float, b: float) -> None:
    latency = Latency(1e-3, line(a, b))
    assert latency.known
    assert latency.line == pytest.approx((a, b), rel=1e-6, abs=1e-9)
    assert latency.seconds(12) == pytest.approx(12 * a + b, rel=0.02)


@given(ticks)
def test_it_is_never_negative_and_bounded_by_what_it_saw(seen: list[tuple[int, float]]) -> None:
    latency = Latency(1e-3)
    for rows, seconds in seen:
        latency.observe(rows, seconds)
        a, b = latency.line
        assert a >= 0
        assert b >= 0
        for size in SIZES:
            assert 0 < latency.seconds(size) < 64 * (max(10.0, *(s for _, s in seen)) + 1)


@given(slopes, offsets, st.floats(0.4, 2.5))
def test_it_follows_a_device_that_changes_its_speed(a: float, b: float, times: float) -> None:
    latency = Latency(1e-3, line(a, b))
    for _ in range(60):
        for rows in SIZES:
            latency.observe(rows, times * (a * rows + b))
    assert latency.line == pytest.approx((times * a, times * b), rel=0.05, abs=0.05 * (a + b))


def test_a_stall_is_no_new_speed() -> None:
    latency = Latency(1e-3, line(0.01, 0.02))
    before = latency.seconds(4)
    latency.observe(4, 1000.0)
    assert latency.seconds(4) <= 3 * before


def test_ticks_that_are_all_alike_leave_it_able_to_learn() -> None:
    latency = Latency(1e-3, line(0.01, 0.02))
    for _ in range(5000):
        latency.observe(1, 0.03)
    assert latency.seconds(1) == pytest.approx(0.03)
    for _ in range(200):
        latency.observe(16, 0.36)
        latency.observe(1, 0.06)
    assert latency.line == pytest.approx((0.02, 0.04), rel=0.05)


def test_the_stairs_of_an_engine_that_pads_are_measured_where_they_ran() -> None:
    latency = Latency(1e-3, line(0.01, 0.0))
    for _ in range(20):
        latency.observe(9, 0.16)
    assert latency.seconds(9) == pytest.approx(0.16, rel=0.05)
    assert latency.seconds(8) == pytest.approx(0.08, rel=0.05)


def test_what_was_measured_long_ago_is_left_to_the_line() -> None:
    latency = Latency(1e-3, {3: 5.0})
    for _ in range(600):
        latency.observe(1, 0.01)
    assert 3 not in latency.sizes
    assert latency.seconds(3) < 5.0


def test_giving_up_again_and_again_without_a_tick_makes_it_expect_less() -> None:
    latency = Latency(1e-3, line(0.01, 0.02))
    before = latency.seconds(1)
    latency.doubt()
    assert latency.seconds(1) == before
    for _ in range(50):
        latency.doubt()
    assert latency.seconds(1) < 0.1 * before
    latency = Latency(1e-3, line(0.01, 0.02))
    for _ in range(50):
        latency.doubt()
        latency.observe(1, 0.03)
    assert latency.seconds(1) == pytest.approx(0.03, rel=0.05)
