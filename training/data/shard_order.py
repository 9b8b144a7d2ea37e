"""The order in which shards are gone through: mixed within windows of shards, addressable at any update."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from training.data.entries import DataError
from training.draws import ITEMS_STREAM, ORDER_STREAM, generator_at

KEPT = 2  # the epochs, and the windows, in which a batch may lie


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
