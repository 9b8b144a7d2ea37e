"""Sets that do not fit in memory: shards read as they are needed, a few kept, a few lost ones survived."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import MappingProxyType
from typing import Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from training.data.place import PAUSES_S, Place, StreamError, one_line, patiently
from training.data.shard_contents import DATA, Contents, ImageFit, Specs, images, tensors, unpack
from training.data.shard_index import IndexedShard, ShardIndex

Said = TypeVar("Said")
LOST_PERCENT = 5


class ShardStream:
    """A set of indexed shards as one long list of items, numbered through all shards; a context manager.

    The last 2 `window` shards are kept in memory: those of a window of `ShardOrder` and of the next one. A shard that
    cannot be read, or is not what the index says, is lost: item i of it becomes item i modulo n of the next good
    shard, in the index's order, of n items. All methods may be called from any thread.
    """

    def __init__(
        self, address: str, window: int = 2, fit: ImageFit | None = None, pauses: Sequence[float] = PAUSES_S
    ) -> None:
        """Opens the index at an address; reads no shard yet.

        Args:
            address: a local folder or an fsspec address, with index.json in it.
            window: of the order in which the items will be asked for, in shards.
            fit: how images become items; shards of tensors take none.
            pauses: seconds before each further try of a read that failed.

        Raises StreamError when there is no index, and for a `fit` that the shards do not take, or need.
        """
        if window < 1:
            raise StreamError("a window needs a shard at least")
        self.place = Place(address)
        self.index = ShardIndex.read(self.place, pauses=pauses)
        if (self.index.kind == "images") != (fit is not None):
            raise StreamError(f"{address} holds {self.index.kind}: a size of images goes with images only")
        self.specs: Specs = fit.specs if fit else self.index.arrays
        self._fit = fit
        self.window, self._limit = window, 2 * window
        self._pauses = pauses
        counts = np.asarray(self.index.counts, np.int64)
        self._ends = counts.cumsum()
        self._starts = self._ends - counts
        self._lost: dict[str, str] = {}
        self._kept: OrderedDict[int, Future[Contents | None]] = OrderedDict()
        self._coming: set[int] = set()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._pool = ThreadPoolExecutor(1, "prefetch")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the background thread, after the read it is at, and lets go of the shards."""
        self._closing.set()
        self._pool.shutdown(cancel_futures=True)
        with self._lock:
            self._kept.clear()

    def __len__(self) -> int:
        """The number of items."""
        return int(self._ends[-1])

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (c, h, w) of one item's x."""
        channels, height, width = self.specs[DATA].shape
        return channels, height, width

    @property
    def counts(self) -> list[int]:
        """The items of each shard, for `ShardOrder`."""
        return self.index.counts

    @property
    def fingerprint(self) -> str:
        """A hash of the index, and so of all bytes of the set."""
        return self.index.fingerprint

    @property
    def lost(self) -> Mapping[str, str]:
        """The shards that were lost so far, and why."""
        with self._lock:
            return MappingProxyType(dict(self._lost))

    def parts(self, items: Tensor, draws: Tensor | None = None) -> dict[str, Tensor]:
        """The arrays (B, ...) of items (B,): x, and those of the condition for one caption of each item.

        `draws` (B,) in [0, 1) choose it: caption floor(draw J) of J, the first without them. x of images is uint8
        (B, 3, size, size).

        Raises IndexError for items that there are not, and StreamError when too many shards are lost.
        """
        chosen = torch.zeros(len(items)) if draws is None else draws
        out = {name: np.empty((len(items), *spec.shape), np.dtype(spec.dtype)) for name, spec in self.specs.items()}
        for number, rows, places in self._by_shard(items):
            contents = self._good(number)
            for row, place in zip(rows, places, strict=True):
                arrays = contents.sample(int(place) % len(contents.samples), float(chosen[row]))
                for name, array in arrays.items():
                    out[name][row] = array
        return {name: torch.from_numpy(array) for name, array in out.items()}

    def require_whole(self) -> None:
        """Raise StreamError where a shard was lost, for whom no other can stand in."""
        if lost := self.lost:
            raise StreamError(f"shards of {self.place.address} are lost: {_listed(lost)}")

    def texts(self, items: Tensor) -> list[tuple[str, ...]]:
        """The captions of items (B,) of a set of images. Raises as `parts` does, and StreamError for tensors."""
        return self._said(items, lambda contents: contents.texts)

    def classes(self, items: Tensor) -> list[str | None]:
        """The class of each of items (B,) of a set of images, if it has one. Raises as `texts` does."""
        return self._said(items, lambda contents: contents.classes)

    def _said(self, items: Tensor, of: Callable[[Contents], Sequence[Said]]) -> list[Said]:
        if self._fit is None:
            raise StreamError(f"{self.place.address} holds tensors: their captions are not kept")
        found: dict[int, Said] = {}
        for number, rows, places in self._by_shard(items):
            said = of(self._good(number))
            found |= {int(row): said[int(place) % len(said)] for row, place in zip(rows, places, strict=True)}
        return [found[row] for row in range(len(items))]

    def prefetch(self, items: Tensor) -> None:
        """Reads the shards of coming items in the background, `window` at most, so that a window in use stays."""
        numbers = dict.fromkeys(int(number) for number in self._shards_of(items))
        with self._lock:
            new = [n for n in list(numbers)[: self._limit // 2] if n not in self._kept and n not in self._coming]
            self._coming.update(new)
        for number in new:
            with suppress(RuntimeError):  # closed meanwhile
                self._pool.submit(self._fetch, number)

    def _fetch(self, number: int) -> None:
        with self._lock:
            wanted = number in self._coming
        if wanted:
            self._good(number)

    def _shards_of(self, items: Tensor) -> NDArray[np.int64]:
        numbers = items.numpy()
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(self):
            raise IndexError(f"items {numbers.min()} to {numbers.max()} of a set of {len(self)}")
        return np.searchsorted(self._ends, numbers, side="right").astype(np.int64)

    def _by_shard(self, items: Tensor) -> list[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
        """For each shard: its number, the rows of `items` that lie in it, and their places within it."""
        shards = self._shards_of(items)
        places = items.numpy() - self._starts[shards]
        found = []
        for number in np.unique(shards):
            rows = np.flatnonzero(shards == number)
            found.append((int(number), rows, places[rows]))
        return found

    def _good(self, number: int) -> Contents:
        """The shard, or the next good one. Raises StreamError when too many are lost, or the stream is closed."""
        for step in range(len(self.index.shards)):
            contents = self._contents((number + step) % len(self.index.shards))
            if contents is not None:
                return contents
            self._require_enough()
        raise StreamError(f"no shard of {self.place.address} can be read: {_listed(self.lost)}")

    def _contents(self, number: int) -> Contents | None:
        """The shard, read by the first thread that asks for it where it is not kept; None when it is lost."""
        shard = self.index.shards[number]
        with self._lock:
            self._coming.discard(number)  # Whoever reads it first: a read ahead that comes later is of no use.
            if self._closing.is_set():
                raise StreamError(f"the stream of {self.place.address} is closed")
            if shard.name in self._lost:
                return None
            future = self._kept.get(number)
            kept = future is not None
            if future is None:
                future = self._kept[number] = Future()
            self._kept.move_to_end(number)
            while len(self._kept) > self._limit:
                self._kept.popitem(last=False)
        if kept:
            return future.result()
        contents = None
        try:
            contents = self._read(shard)
        except (OSError, ValueError) as error:
            self._lose(number, error)
        except BaseException as error:
            with self._lock:
                self._kept.pop(number, None)
            future.set_exception(error)
            raise
        future.set_result(contents)
        return contents

    def _read(self, shard: IndexedShard) -> Contents:
        """The shard's contents. Raises OSError or ValueError when it cannot be read, or is not what the index says."""

        def read() -> bytes:
            data = self.place.read(shard.name)
            shard.check(data)
            return data

        samples = unpack(patiently(read, f"{self.place.address}/{shard.name}", self._pauses, self._pause))
        if len(samples) != shard.samples:
            raise ValueError(f"it has {len(samples)} samples, and {shard.samples} in the index")
        return images(samples, self._fit) if self._fit else tensors(samples, self.specs)

    def _pause(self, seconds: float) -> None:
        if self._closing.wait(seconds):
            raise StreamError(f"the stream of {self.place.address} is closed")

    def _lose(self, number: int, error: Exception) -> None:
        """Notes that a shard is lost, and tells it."""
        shard = self.index.shards[number]
        with self._lock:
            self._kept.pop(number, None)
            told = shard.name in self._lost
            self._lost[shard.name] = one_line(error)
            lost = len(self._lost)
        if not told:
            tqdm.write(
                f"{self.place.address}: shard {shard.name} is lost: {one_line(error)}; the next good one stands in for "
                f"its {shard.samples} items ({lost} lost, {self._allowed} allowed)"
            )

    @property
    def _allowed(self) -> int:
        return max(1, len(self.index.shards) * LOST_PERCENT // 100)

    def _require_enough(self) -> None:
        lost = self.lost
        if len(lost) > self._allowed:
            raise StreamError(
                f"{len(lost)} of the {len(self.index.shards)} shards of {self.place.address} are lost, and "
                f"{self._allowed} may be: {_listed(lost)}"
            )


def _listed(lost: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in sorted(lost.items()))
