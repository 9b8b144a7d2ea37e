"""Deficit round robin: equal costs over any time, whatever a tick of each group costs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.batching.shares import Shares

costs = st.dictionaries(st.sampled_from("abcde"), st.floats(0.01, 10.0), min_size=1)


@given(costs, st.integers(50, 400))
def test_groups_that_always_have_work_are_served_the_same_cost(prices: dict[str, float], turns: int) -> None:
    shares, served = Shares(), dict.fromkeys(prices, 0.0)
    for _ in range(turns):
        chosen = str(shares.next(prices))
        served[chosen] += prices[chosen]
    assert max(served.values()) - min(served.values()) <= 3 * max(prices.values())


@given(costs, st.integers(50, 400))
def test_one_that_is_always_urgent_stays_within_its_loan(prices: dict[str, float], turns: int) -> None:
    shares, served = Shares(), dict.fromkeys(prices, 0.0)
    pushy = min(prices)
    for _ in range(turns):
        chosen = str(shares.next(prices, pushy))
        served[chosen] += prices[chosen]
    assert max(served.values()) - min(served.values()) <= 8 * max(prices.values())


def test_an_urgent_group_goes_first() -> None:
    shares = Shares()
    assert [shares.next({"a": 1.0, "b": 1.0}, "b") for _ in range(3)] == ["b", "b", "b"]


def test_who_comes_back_has_neither_credit_nor_debt() -> None:
    shares = Shares()
    for _ in range(100):
        shares.next({"a": 1.0})
    assert {shares.next({"a": 1.0, "b": 1.0}) for _ in range(2)} == {"a", "b"}
