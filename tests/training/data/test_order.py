"""The order of shards: every item once an epoch, neighbours mixed, the same wherever one starts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.entries import DataError
from training.data.order import ShardOrder

COUNTS = st.lists(st.integers(1, 9), min_size=1, max_size=7)
quick = settings(deadline=None, max_examples=60)


def positions(order: ShardOrder, updates: range) -> list[int]:
    return [int(item) for update in updates for item in order.at(update)]


@quick
@given(COUNTS, st.integers(1, 12), st.integers(0, 2**40), st.integers(1, 4))
def test_every_epoch_has_every_item_once(counts: list[int], batch_size: int, seed: int, window: int) -> None:
    items = sum(counts)
    drawn = positions(ShardOrder(counts, batch_size, seed, window), range(3 * items // batch_size + 1))
    for epoch in range(3):
        assert sorted(drawn[epoch * items : (epoch + 1) * items]) == list(range(items))


@quick
@given(COUNTS, st.integers(1, 12), st.integers(0, 99), st.integers(1, 4), st.lists(st.integers(0, 60), min_size=1))
def test_an_update_has_the_same_items_wherever_one_starts(
    counts: list[int], batch_size: int, seed: int, window: int, updates: list[int]
) -> None:
    from_the_start = ShardOrder(counts, batch_size, seed, window)
    in_turn = [from_the_start.at(update) for update in range(max(updates) + 1)]
    jumping = ShardOrder(counts, batch_size, seed, window)
    for update in updates:
        assert torch.equal(jumping.at(update), in_turn[update])


@quick
@given(COUNTS, st.integers(0, 99), st.integers(1, 4))
def test_the_batch_size_does_not_change_the_order(counts: list[int], seed: int, window: int) -> None:
    singly = positions(ShardOrder(counts, 1, seed, window), range(60))
    assert positions(ShardOrder(counts, 12, seed, window), range(5)) == singly


@quick
@given(COUNTS, st.integers(0, 99), st.integers(1, 4))
def test_a_stretch_of_an_epoch_lies_in_one_window_of_shards(counts: list[int], seed: int, window: int) -> None:
    shard_of = [shard for shard, count in enumerate(counts) for _ in range(count)]
    order = [shard_of[item] for item in positions(ShardOrder(counts, 1, seed, window), range(sum(counts)))]
    windows = []
    while order:
        size = next(size for size in range(len(order), 0, -1) if _whole(order[:size], counts, window))
        windows.append(set(order[:size]))
        order = order[size:]
    assert [len(shards) for shards in windows[:-1]] == [window] * (len(windows) - 1)


def _whole(stretch: list[int], counts: list[int], window: int) -> bool:
    """Whether a stretch holds whole shards, as many as a window at most."""
    shards = set(stretch)
    return len(shards) <= window and len(stretch) == sum(counts[shard] for shard in shards)


@quick
@given(COUNTS, st.integers(1, 12), st.integers(0, 99), st.integers(1, 4))
def test_what_lies_ahead_is_the_window_after_the_one_that_an_update_begins_in(
    counts: list[int], batch_size: int, seed: int, window: int
) -> None:
    order, items = ShardOrder(counts, batch_size, seed, window), sum(counts)
    windows = [
        (epoch * items + int(end), [order._starts[shard] for shard in shards.tolist()])
        for epoch in range(4)
        for shards, end in zip(*order._epoch(epoch), strict=True)
    ]
    for update in range(3 * items // batch_size):
        current = next(k for k, (end, _) in enumerate(windows) if update * batch_size < end)
        assert order.ahead(update).tolist() == windows[current + 1][1]


def test_neighbours_of_one_shard_are_mixed_with_those_of_another() -> None:
    first = ShardOrder([100, 100, 100, 100], 20, seed=3).at(0)
    assert len(set((first // 100).tolist())) == 2
    assert first.dtype == torch.int64
    assert not torch.equal(first.sort().values, first)


def test_seeds_epochs_and_windows_differ() -> None:
    order = ShardOrder([50, 50], 100, seed=1)
    assert not torch.equal(order.at(0), order.at(1))
    assert not torch.equal(order.at(0), ShardOrder([50, 50], 100, seed=2).at(0))
    one_by_one = ShardOrder([50, 50], 50, seed=1, window=1)
    assert not torch.equal(one_by_one.at(0) % 50, one_by_one.at(1) % 50)


def test_little_is_kept_however_long_the_run() -> None:
    order = ShardOrder([3] * 40, 7, seed=0)
    for update in range(200):
        order.at(update)
    epochs, windows = order._epoch.cache_info(), order._items.cache_info()
    assert max(epochs.currsize, windows.currsize) <= 2
    assert (epochs.misses, windows.misses) == (12, 234), "each is made once"


@pytest.mark.parametrize(("counts", "batch_size", "window"), [([], 1, 1), ([3, 0], 1, 1), ([3], 0, 1), ([3], 1, 0)])
def test_numbers_that_give_no_order_are_refused(counts: list[int], batch_size: int, window: int) -> None:
    with pytest.raises(DataError, match="needs"):
        ShardOrder(counts, batch_size, 0, window)
