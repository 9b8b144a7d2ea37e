"""The order in which shards are gone through: mixed within windows of shards, addressable at any update."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from training.data.entries import DataError
from training.draws import generator_at

Key = TypeVar("Key", bound=Hashable)
SHARDS_STREAM, ITEMS_STREAM = 1, 5  # of the generators of `generator_at`
KEPT_WINDOWS = 2  # in which a batch may lie


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
        self._epochs: OrderedDict[int, tuple[tuple[Tensor, ...], Tensor]] = OrderedDict()
        self._permuted: OrderedDict[tuple[int, int], Tensor] = OrderedDict()

    def at(self, update: int) -> Tensor:
        """The item numbers int64 (batch_size,) of an update: O(batch_size) once its windows are permuted."""
        position, end = update * self.batch_size, (update + 1) * self.batch_size
        pieces = []
        while position < end:
            epoch, within = divmod(position, self.items)
            _, ends = _kept(self._epochs, epoch, self._epoch, 2)
            window = int(torch.searchsorted(ends, within, right=True))
            left = int(ends[window]) - within
            items = _kept(self._permuted, (epoch, window), self._permute, KEPT_WINDOWS)
            pieces.append(items[len(items) - left :][: end - position])
            position += len(pieces[-1])
        return torch.cat(pieces)

    def ahead(self, update: int) -> Tensor:
        """The first item of each shard of the window after the one that an update begins in.

        Whoever reads these, with a window of shards in use, has the time of a whole window to do so.
        """
        epoch, within = divmod(update * self.batch_size, self.items)
        _, ends = _kept(self._epochs, epoch, self._epoch, 2)
        more, window = divmod(int(torch.searchsorted(ends, within, right=True)) + 1, self._windows)
        windows, _ = _kept(self._epochs, epoch + more, self._epoch, 2)
        return torch.tensor([self._starts[shard] for shard in windows[window].tolist()])

    def _epoch(self, epoch: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """The shards of each window of an epoch, and the positions (windows,) at which the windows end."""
        shards = torch.randperm(len(self._counts), generator=generator_at(self.seed, epoch, SHARDS_STREAM))
        windows = shards.split(self.window)
        return windows, torch.stack([self._counts[some].sum() for some in windows]).cumsum(0)

    def _permute(self, key: tuple[int, int]) -> Tensor:
        """The items of a window of an epoch, in their order."""
        epoch, window = key
        windows, _ = _kept(self._epochs, epoch, self._epoch, 2)
        shards = windows[window].tolist()
        items = torch.cat([torch.arange(self._starts[shard], self._ends[shard]) for shard in shards])
        generator = generator_at(self.seed, epoch * self._windows + window, ITEMS_STREAM)
        return items[torch.randperm(len(items), generator=generator)]


def _kept(cache: OrderedDict[Key, Any], key: Key, make: Callable[[Key], Any], limit: int) -> Any:
    """The value of a key, made where it is not among the last `limit` that were used."""
    if key not in cache:
        cache[key] = make(key)
    cache.move_to_end(key)
    while len(cache) > limit:
        cache.popitem(last=False)
    return cache[key]
