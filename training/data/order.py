"""The order in which items are learned from, addressable at any update: all mixed, or within windows of shards."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from training.data.entries import DataError
from training.draws import ITEMS_STREAM, ORDER_STREAM, generator_at
from training.errors import TrainingError

KEPT = 2  # the epochs, and the windows, in which a batch may lie


class Order(Protocol):
    """Which items form the batch of an update, at any update."""

    def at(self, update: int) -> Tensor:
        """The item indices (batch_size,)."""
        ...

    def ahead(self, update: int) -> Tensor:
        """Items that are worth preparing once those of the update are there."""
        ...


class BatchOrder:
    """Which items form the batch of an update: epochs of seeded permutations, addressable at any update."""

    def __init__(self, items: int, batch_size: int, seed: int) -> None:
        """Over `items` items. Raises TrainingError when there are none."""
        if items < 1:
            raise TrainingError("the data set is empty")
        self.items, self.batch_size, self.seed = items, batch_size, seed
        self._epochs: dict[int, Tensor] = {}

    def at(self, update: int) -> Tensor:
        """The item indices (batch_size,) of an update."""
        place, stop = update * self.batch_size, (update + 1) * self.batch_size
        parts = []
        while place < stop:
            epoch, first = divmod(place, self.items)
            parts.append(self._permutation(epoch)[first : first + stop - place])
            place += len(parts[-1])
        return torch.cat(parts)

    def ahead(self, update: int) -> Tensor:
        """Nothing: all items are there."""
        return torch.empty(0, dtype=torch.int64)

    def _permutation(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            self._epochs = {e: p for e, p in self._epochs.items() if e == epoch - 1}
            self._epochs[epoch] = torch.randperm(self.items, generator=generator_at(self.seed, epoch, ORDER_STREAM))
        return self._epochs[epoch]


class ShardOrder:
    """Which items form the batch of an update, where only a few shards can be held in memory at once.

    An epoch goes through the shards in a seeded permutation, `window` of them at a time, and through the items of
    such a window in a seeded permutation: each item once an epoch. Items are numbered through all shards.
    """

    def __init__(self, counts: Sequence[int], batch_size: int, seed: int, window: int = 2) -> None:
        """Over shards of `counts` items. Raises DataError for no shard, an empty one, and numbers below 1."""
        if not counts or min(counts) < 1:
            raise DataError("the order of shards needs shards, and none may be empty")
        if batch_size < 1 or window < 1:
            raise DataError("a batch needs an item at least, and a window a shard")
        self.items, self.batch_size, self.seed, self.window = sum(counts), batch_size, seed, window
        self._counts = torch.tensor(counts)
        self._ends = [int(end) for end in self._counts.cumsum(0)]
        self._starts = [0, *self._ends[:-1]]
        self._windows = -(-len(counts) // window)
        self._epoch = lru_cache(KEPT)(self._windows_of)
        self._items = lru_cache(KEPT)(self._permuted)

    def at(self, update: int) -> Tensor:
        """The item numbers int64 (batch_size,) of an update: O(batch_size) once its windows are permuted."""
        position, end = update * self.batch_size, (update + 1) * self.batch_size
        pieces = []
        while position < end:
            epoch, within = divmod(position, self.items)
            _, ends = self._epoch(epoch)
            window = int(torch.searchsorted(ends, within, right=True))
            left = int(ends[window]) - within
            items = self._items(epoch, window)
            pieces.append(items[len(items) - left :][: end - position])
            position += len(pieces[-1])
        return torch.cat(pieces)

    def ahead(self, update: int) -> Tensor:
        """The first item of each shard of the window after the one that an update begins in.

        Whoever reads these, with a window of shards in use, has the time of a whole window to do so.
        """
        epoch, within = divmod(update * self.batch_size, self.items)
        _, ends = self._epoch(epoch)
        more, window = divmod(int(torch.searchsorted(ends, within, right=True)) + 1, self._windows)
        windows, _ = self._epoch(epoch + more)
        return torch.tensor([self._starts[shard] for shard in windows[window].tolist()])

    def _windows_of(self, epoch: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """The shards of each window of an epoch, and the positions (windows,) at which the windows end."""
        shards = torch.randperm(len(self._counts), generator=generator_at(self.seed, epoch, ORDER_STREAM))
        windows = shards.split(self.window)
        return windows, torch.stack([self._counts[some].sum() for some in windows]).cumsum(0)

    def _permuted(self, epoch: int, window: int) -> Tensor:
        """The items of a window of an epoch, in their order."""
        windows, _ = self._epoch(epoch)
        shards = windows[window].tolist()
        items = torch.cat([torch.arange(self._starts[shard], self._ends[shard]) for shard in shards])
        generator = generator_at(self.seed, epoch * self._windows + window, ITEMS_STREAM)
        return items[torch.randperm(len(items), generator=generator)]
