"""The index of a set of shards: which there are, in their order, and what is in them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from tqdm import tqdm

from engines.problems import problem_of
from training.data.captioned import SPLITS
from training.data.place import PAUSES_S, Place, StreamError, one_line, patiently
from training.data.shard_contents import (
    DATA,
    ArraySpec,
    ImageFit,
    Kind,
    images,
    kind_of,
    require_finite,
    specs_of,
    tensors,
    unpack,
)
from training.store import hash_of

INDEX = "index.json"
PROGRESS = "progress.json"
"""The index of what `fewstep precompute` has written so far."""
FORMAT_VERSION = 1
Positive = Annotated[int, Field(gt=0, strict=True)]


class IndexedShard(BaseModel):
    """One shard: its file's name, how many samples and bytes it has, and the SHA-256 of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[^/\\.][^/\\]*\.tar$")]
    samples: Positive
    size_bytes: Positive
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    @classmethod
    def of(cls, name: str, samples: int, data: bytes) -> IndexedShard:
        """The entry of a shard's bytes."""
        return cls(name=name, samples=samples, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    def check(self, data: bytes) -> None:
        """Raises ValueError when bytes are not those of this shard."""
        if len(data) != self.size_bytes:
            raise ValueError(f"it has {len(data)} bytes, and {self.size_bytes} in the index")
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise ValueError("its SHA-256 is not that of the index")


class MadeWith(BaseModel):
    """What precomputed items were made with.

    A hash of the `autoencoder`, None where x are pixels; what names the encoder of `prompts`, or the `classes` that
    labels count, in their order; and how images were `fit` into squares, None where they were padded.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    autoencoder: str | None = None
    prompts: str | None = None
    classes: tuple[str, ...] = ()
    fit: Literal["crop"] | None = None


class ShardIndex(BaseModel):
    """A set of shards. `arrays` says what an item of tensors has; `source` is a hash of what it was computed from.

    `made_with` is None where it is not known: the shards are not of `fewstep precompute`, or older than the field.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Annotated[int, Field(ge=FORMAT_VERSION, le=FORMAT_VERSION)] = FORMAT_VERSION
    kind: Kind
    arrays: Mapping[str, ArraySpec] = {}
    source: str = ""
    made_with: MadeWith | None = None
    shards: Annotated[tuple[IndexedShard, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def consistent(self) -> Self:
        """Only tensors have arrays, x among them, and no two shards share a name."""
        if (self.kind == "tensors") != (DATA in self.arrays) or (self.kind == "images" and self.arrays):
            raise ValueError(f"the arrays are not those of {self.kind}")
        if DATA in self.arrays and len(self.arrays[DATA].shape) != 3:
            raise ValueError("x is not (c, h, w)")
        if len({shard.name for shard in self.shards}) < len(self.shards):
            raise ValueError("a shard is listed twice")
        return self

    @property
    def counts(self) -> list[int]:
        """The samples of each shard."""
        return [shard.samples for shard in self.shards]

    @property
    def fingerprint(self) -> str:
        """A hash of all that the index says, and so of all bytes of the set."""
        return hash_of(self.model_dump(mode="json", exclude_none=True))

    def write(self, place: Place, name: str = INDEX) -> None:
        """Writes the index beside the shards. Raises StreamError."""
        place.write(name, (self.model_dump_json(indent=1, exclude_none=True) + "\n").encode())

    @classmethod
    def read(cls, place: Place, name: str = INDEX, pauses: Sequence[float] = PAUSES_S) -> ShardIndex:
        """Reads the index beside the shards. Raises StreamError when there is none, or it is none."""
        file = f"{place.address}/{name}"
        try:
            return cls.model_validate_json(patiently(partial(place.read, name), file, pauses))
        except FileNotFoundError:
            if place.size(PROGRESS) is not None:
                raise StreamError(unfinished(place.address)) from None
            raise StreamError(f"{file} is missing: `fewstep data index {place.address}` makes it") from None
        except ValidationError as error:
            raise StreamError(f"{file} is not an index of shards: {problem_of(error.errors()[0])}") from None
        except OSError as error:
            raise StreamError(f"{file} cannot be read: {one_line(error)}") from error


def unfinished(address: str) -> str:
    """What is said of shards that are not whole yet."""
    return f"{address} was not precomputed to its end: the same `fewstep precompute` goes on with it"


def make_index(address: str, pauses: Sequence[float] = PAUSES_S) -> ShardIndex:
    """Reads every shard at an address once, and writes the index of all beside them, in the order of their names.

    An index of the same shards stays as it is, with what it says of their origin. Raises StreamError, with the name,
    for a shard that is empty, broken or unlike the first, a sample that comes twice or whose parts are unlike those of
    the others, for an index.json there that is none, and for shards that are still being precomputed.
    """
    place = Place(address)
    names = place.names(".tar")
    if not names:
        splits = [f"{address.rstrip('/')}/{split}" for split in SPLITS]
        lie = [split for split in splits if Place(split).names(".tar")]
        raise StreamError(f"{address} holds no .tar shard" + (f"; index one of {', '.join(lie)}" if lie else ""))
    before = None
    if place.size(INDEX) is None and place.size(PROGRESS) is not None:
        raise StreamError(unfinished(address))
    if place.size(INDEX) is not None:
        before = ShardIndex.read(place, pauses=pauses)  # nothing else is overwritten
    scan = _Scan()
    for name in tqdm(names, desc="indexing", unit="shard", disable=None):
        try:
            scan.add(name, patiently(partial(place.read, name), f"{address}/{name}", pauses))
        except (OSError, ValueError) as error:
            raise StreamError(f"{address}/{name} cannot be indexed: {one_line(error)}") from error
    index = scan.index()
    if before is not None and before.shards == index.shards:
        return before
    index.write(place)
    return index


class _Scan:
    """What was found in the shards so far."""

    def __init__(self) -> None:
        self._shards: dict[str, IndexedShard] = {}  # by hash
        self._keys: set[str] = set()
        self._kind: Kind | None = None
        self._arrays: Mapping[str, ArraySpec] | None = None

    def add(self, name: str, data: bytes) -> None:
        """Adds a shard. Raises ValueError when it is faulty, or does not belong to those before."""
        samples = unpack(data)
        shard = IndexedShard.of(name, len(samples), data)
        if (twin := self._shards.get(shard.sha256)) is not None:
            raise ValueError(f"it is the same as {twin.name}")
        for key, parts in samples.items():
            if key in self._keys:
                raise ValueError(f"sample {key} is in another shard too")
            self._kind = self._kind or kind_of(parts)
            if kind_of(parts) != self._kind:
                raise ValueError(f"sample {key} has {', '.join(parts)}; others are {self._kind}")
        if self._kind == "tensors":
            found = tensors(samples, self._arrays).samples
            self._arrays = specs_of(found[0])
            for key, arrays in zip(samples, found, strict=True):
                require_finite(arrays, f"sample {key}: ")
        else:
            images(samples, ImageFit(size=1))
        self._keys.update(samples)
        self._shards[shard.sha256] = shard

    def index(self) -> ShardIndex:
        """The index of what was added."""
        assert self._kind is not None
        return ShardIndex(kind=self._kind, arrays=self._arrays or {}, shards=tuple(self._shards.values()))
