"""Draws: a row's numbers depend on its place alone, however a batch is split."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from training.draws import Draws, generator_at


def drawn(rows: range, update: int = 3) -> list[torch.Tensor]:
    draws = Draws(7, update, rows)
    like = torch.empty(len(rows), 2, 3)
    return [draws.integers(10), draws.normal(like), draws.uniform(), draws.normal(like)]


@given(st.integers(0, 60), st.integers(1, 40))
def test_a_part_of_a_batch_draws_what_the_whole_draws_there(start: int, count: int) -> None:
    for whole, part in zip(drawn(range(100)), drawn(range(start, start + count)), strict=True):
        assert torch.equal(whole[start : start + count], part)


def test_rows_draws_and_updates_differ() -> None:
    integers, first, uniform, second = drawn(range(100))
    assert len(first.flatten(1).unique(dim=0)) == 100
    assert not torch.equal(first, second)
    assert not torch.equal(first, drawn(range(100), update=4)[1])
    assert set(integers.tolist()) == set(range(10))
    assert ((uniform >= 0) & (uniform < 1)).all()


def test_draws_are_of_the_distributions_they_name() -> None:
    draws = Draws(0, 0, range(4000))
    normal, uniform = draws.normal(torch.empty(4000, 5)), draws.uniform()
    assert abs(normal.mean()) < 0.03
    assert abs(normal.std() - 1) < 0.03
    assert abs(uniform.mean() - 0.5) < 0.02
    assert abs(uniform.std() - 12**-0.5) < 0.02


def test_generators_differ_by_seed_place_and_stream() -> None:
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert len({float(torch.rand(1, generator=generator_at(*key))) for key in keys}) == len(keys)
