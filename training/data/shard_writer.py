"""Writes shards of precomputed arrays to any address, one whole shard after another, and their index at the end."""

from __future__ import annotations

import io
import tarfile
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from training.data.place import Place, StreamError
from training.data.shard_contents import Arrays, ArraySpec, described, require_finite, specs_of
from training.data.shard_index import INDEX, PROGRESS, IndexedShard, MadeWith, ShardIndex
from training.data.shards import add_file


class TensorShardWriter:
    """Writes samples of arrays into numbered shards, `per_shard` to each; a context manager.

    A writer that is opened where another was stopped goes on after the shards that are whole: the caller leaves out
    the first `done` samples. The same input gives the same bytes, stopped or not. `source`, a hash of what the samples
    are computed from, keeps those of different sources apart, as `made_with` does where the place has it.
    """

    def __init__(self, address: str, per_shard: int, source: str = "", made_with: MadeWith | None = None) -> None:
        """Opens the address. Raises StreamError when what is there was not begun with the same arguments."""
        if per_shard < 1:
            raise StreamError("a shard needs a sample at least")
        self.place = Place(address)
        self.per_shard = per_shard
        self.source = source
        self.made_with = made_with
        self._arrays: dict[str, ArraySpec] | None = None
        self._shards: list[IndexedShard] = []
        self._complete = False
        self._find()
        self.done = self.count = sum(shard.samples for shard in self._shards)
        self._buffer = io.BytesIO()
        self._archive: tarfile.TarFile | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None and not self._complete:
            self._flush()
            self._index().write(self.place)
            self.place.remove(PROGRESS)

    def write(self, arrays: Arrays) -> None:
        """Adds a sample: x (c, h, w), and the arrays of its condition, each with a first axis over J captions.

        Raises StreamError for arrays that are not a sample, are unlike those before or not finite; when the shard
        cannot be written; and when the set is complete already.
        """
        if self._complete:
            raise StreamError(f"{self.place.address} is complete, with {self.count} samples; choose another place")
        try:
            specs = specs_of(arrays)
            require_finite(arrays)
        except ValueError as error:
            raise StreamError(f"sample {self.count}: {error}") from error
        self._arrays = self._arrays or specs
        if specs != self._arrays:
            raise StreamError(f"sample {self.count} has {described(specs)}; others have {described(self._arrays)}")
        if self._archive is None:
            self._buffer = io.BytesIO()
            self._archive = tarfile.open(fileobj=self._buffer, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        for name in specs:
            add_file(self._archive, f"{self.count:09d}.{name}.npy", _npy(arrays[name]))
        self.count += 1
        if self.count % self.per_shard == 0:
            self._flush()

    def _flush(self) -> None:
        """Writes the shard that was begun, if any."""
        if self._archive is None:
            return
        self._archive.close()
        self._archive = None
        data = self._buffer.getvalue()
        samples = self.count - sum(shard.samples for shard in self._shards)
        shard = IndexedShard.of(f"{len(self._shards):06d}.tar", samples, data)
        self._shards.append(shard)
        self._index().write(self.place, PROGRESS)  # first, so that shards without it are known to be another's
        self.place.write(shard.name, data)

    def _index(self) -> ShardIndex:
        if self._arrays is None:
            raise StreamError(f"no sample was written to {self.place.address}")
        return ShardIndex(
            kind="tensors",
            arrays=self._arrays,
            source=self.source,
            made_with=self.made_with,
            shards=tuple(self._shards),
        )

    def _find(self) -> None:
        """Takes over the shards that are whole already."""
        indices = [name for name in (INDEX, PROGRESS) if self.place.size(name) is not None]
        if not indices:
            if self.place.names(".tar"):
                raise StreamError(f"{self.place.address} holds shards that were not begun here; choose another place")
            return
        index = ShardIndex.read(self.place, indices[0])
        if indices == [INDEX, PROGRESS] and not index.source:  # of shards that somebody else indexed meanwhile
            indices = [PROGRESS]
            index = ShardIndex.read(self.place, PROGRESS)
        same = index.source == self.source and index.made_with in (None, self.made_with)
        if not same or any(count != self.per_shard for count in index.counts[:-1]):
            raise StreamError(
                f"{self.place.address} was begun from another source, or with another number of samples to a shard; "
                "choose another place"
            )
        self._arrays = dict(index.arrays)
        for shard in index.shards:
            if self.place.size(shard.name) != shard.size_bytes:
                break
            self._shards.append(shard)
        self._complete = indices[0] == INDEX and len(self._shards) == len(index.shards)
        if not self._complete and self._shards and self._shards[-1].samples < self.per_shard:
            self._shards.pop()  # the end of that run, not of this one


def _npy(array: NDArray[Any]) -> bytes:
    data = io.BytesIO()
    np.save(data, np.ascontiguousarray(array), allow_pickle=False)
    return data.getvalue()
