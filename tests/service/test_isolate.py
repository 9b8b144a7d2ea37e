"""Bisection finds exactly the bad items, in few calls, and says who is at fault."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.backends.base import DeviceMemoryError, EngineError
from engines.pipeline import TaskError
from service.batching.caps import Caps
from service.batching.isolate import BROKEN, Isolator, failures, isolate
from service.jobs import Failed


@given(st.integers(0, 40), st.sets(st.integers(0, 39)))
def test_only_the_bad_items_fail(count: int, bad: set[int]) -> None:
    calls: list[int] = []

    def double(items: Sequence[int]) -> list[int]:
        calls.append(len(items))
        if bad.intersection(items):
            raise EngineError("bad")
        return [2 * item for item in items]

    results = isolate(double, list(range(count)), lambda *_: None)
    for item, result in enumerate(results):
        assert isinstance(result, EngineError) if item in bad else result == 2 * item
    wrong = len(bad & set(range(count)))
    assert len(calls) <= 1 + 2 * wrong * math.ceil(math.log2(max(count, 2)))


def test_what_did_not_fit_in_memory_is_not_tried_again_for_a_minute() -> None:
    now, calls = 0.0, list[int]()

    def small(items: Sequence[int]) -> Sequence[int]:
        calls.append(len(items))
        if len(items) > 3:
            raise DeviceMemoryError("out of memory")
        return items

    isolator = Isolator[int](lambda *_: None, lambda: now, Caps())
    items = list(range(8))
    for seconds, group, expected in (
        (0, "a", [8, 4, 2, 2, 4, 2, 2]),
        (59, "a", [2, 2, 2, 2]),
        (59, "b", [8, 4, 2, 2, 4, 2, 2]),
        (61, "a", [8, 4, 2, 2, 4, 2, 2]),
    ):
        now = float(seconds)
        calls.clear()
        assert isolator.run(group, small, items) == items
        assert calls == expected, (seconds, group)


def test_nothing_is_called_for_no_items() -> None:
    def never(_: Sequence[int]) -> list[int]:
        raise AssertionError

    assert isolate(never, [], lambda *_: None) == []
    assert Isolator[int](lambda *_: None, lambda: 0.0, Caps()).run("a", never, []) == []


def test_a_lone_bad_item_is_at_fault_but_a_failing_batch_may_be_the_engines() -> None:
    error = EngineError("x")
    [good, bad] = failures(["fine", error])
    assert good is None
    assert bad is not None
    assert not bad.retryable
    assert failures([error, error]) == [BROKEN, BROKEN]
    assert BROKEN.retryable


def test_a_task_error_is_the_clients() -> None:
    [failure] = failures([TaskError("empty_prompt", "condition", "the prompt is empty")])
    assert failure == Failed("invalid", "the prompt is empty", "empty_prompt", "condition")


def test_what_is_no_exception_of_the_program_is_not_caught() -> None:
    def stop(_: Sequence[int]) -> list[int]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        isolate(stop, [1, 2], lambda *_: None)
