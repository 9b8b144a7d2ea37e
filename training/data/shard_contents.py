"""What a streamed shard holds, out of its bytes: arrays, or images with captions.

A sample of arrays is `<key>.x.npy`, a latent or pixels (c, h, w), beside one `<key>.<name>.npy` for each array of its
condition. Their first axis goes over the captions of the item, J of them, which may differ from item to item: a context
is (J, L, D), a label (J,).
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from training.data.captioned import WHITE
from training.data.entries import Entry
from training.data.pixels import Colour, Fit, composite, decode, fit_square
from training.data.shards import captioned_entry, file_members, key_and_suffix

Arrays = Mapping[str, NDArray[Any]]
Kind = Literal["tensors", "images"]
Parts = Mapping[str, memoryview]

DATA = "x"
NAME = re.compile("[a-z][a-z0-9_]*")
Dtype = Literal["float16", "float32", "int32", "int64", "uint8"]
DTYPES = get_args(Dtype)
HEADER_BYTES = 10_000  # the most that numpy takes


class ArraySpec(BaseModel):
    """An array of an item: its shape, without the axis of captions, and the name of its type."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: tuple[int, ...]
    dtype: Dtype

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape)) or 'scalar'} {self.dtype}"


Specs = Mapping[str, ArraySpec]


@dataclass(frozen=True)
class ImageFit:
    """How images become items: squares of `size` pixels, padded or cropped, over a background where they are clear."""

    size: int
    background: Colour = WHITE
    fit: Fit = "pad"

    @property
    def specs(self) -> dict[str, ArraySpec]:
        """x: (3, size, size) in 0..255."""
        return {DATA: ArraySpec(shape=(3, self.size, self.size), dtype="uint8")}


@dataclass(frozen=True)
class Contents:
    """A decoded shard: the arrays of each sample, and where it is of images, captions and class, if it has one."""

    samples: tuple[Arrays, ...]
    texts: tuple[tuple[str, ...], ...] = ()
    classes: tuple[str | None, ...] = ()

    def sample(self, place: int, draw: float) -> Arrays:
        """The arrays of a sample, those of the condition for caption floor(draw J), where draw is in [0, 1)."""
        return {
            name: array if name == DATA else array[int(draw * len(array))]
            for name, array in self.samples[place].items()
        }


def unpack(data: bytes) -> dict[str, Parts]:
    """The parts of each sample by key. Raises ValueError for a broken or empty tar, and a part that comes twice."""
    samples: dict[str, dict[str, memoryview]] = {}
    view = memoryview(data)
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for member in file_members(archive):
                key, suffix = key_and_suffix(member.name)
                parts = samples.setdefault(key, {})
                if suffix in parts:
                    raise ValueError(f"{member.name} comes twice")
                parts[suffix] = view[member.offset_data : member.offset_data + member.size]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"it is not a whole tar: {error}") from error
    if not samples:
        raise ValueError("it has no sample")
    return dict(samples)


def kind_of(parts: Parts) -> Kind:
    """What a sample is made of."""
    return "tensors" if any(suffix.endswith(".npy") for suffix in parts) else "images"


def tensors(samples: Mapping[str, Parts], specs: Specs | None = None) -> Contents:
    """A shard of arrays, read in place. Raises ValueError for a sample unlike `specs`, or unlike the first."""
    found = []
    for key, parts in samples.items():
        try:
            arrays = {suffix[1:].removesuffix(".npy"): _array(suffix, part) for suffix, part in parts.items()}
            own = specs_of(arrays)
        except ValueError as error:
            raise ValueError(f"sample {key}: {error}") from error
        specs = own if specs is None else specs
        if own != specs:
            raise ValueError(f"sample {key} has {described(own)}; others have {described(specs)}")
        found.append(arrays)
    return Contents(tuple(found))


def images(samples: Mapping[str, Parts], fit: ImageFit) -> Contents:
    """A shard of images. Raises ValueError for a sample without an image that decodes, or without captions or class."""
    found, texts, classes = [], [], []
    for key, parts in samples.items():
        entry = captioned_entry(key, {suffix: partial(bytes, part) for suffix, part in parts.items()})
        if not isinstance(entry, Entry):
            raise ValueError(f"sample {entry}")
        try:
            rgba = np.asarray(fit_square(decode(entry.read()), fit.size, fit.fit), np.uint8)
        except ValueError as error:
            raise ValueError(f"sample {key}: {error}") from error
        found.append({DATA: composite(rgba, fit.background).transpose(2, 0, 1)})
        texts.append(entry.record.texts)
        classes.append(entry.record.class_name)
    return Contents(tuple(found), tuple(texts), tuple(classes))


def specs_of(arrays: Arrays) -> dict[str, ArraySpec]:
    """The specs of a sample's arrays, sorted by name. Raises ValueError when they are not a sample."""
    x = arrays.get(DATA)
    if x is None or x.ndim != 3 or x.dtype.name not in ("float16", "float32"):
        raise ValueError("x is missing, or is not (c, h, w) of float16 or float32")
    condition = {name: array for name, array in arrays.items() if name != DATA}
    captions = {array.shape[:1] for array in condition.values()}
    if len(captions) > 1 or captions & {(), (0,)}:
        raise ValueError("the arrays of the condition have no first axis in common that goes over the captions")
    for name, array in arrays.items():
        if not NAME.fullmatch(name):
            raise ValueError(f'"{name}" is not a name of lower-case letters, digits and _')
        if not array.dtype.isnative or array.dtype.name not in DTYPES:
            raise ValueError(f"{name} is of {array.dtype}, not of {', '.join(DTYPES)}")
    shapes = {name: array.shape if name == DATA else array.shape[1:] for name, array in arrays.items()}
    return {
        name: ArraySpec.model_validate({"shape": shapes[name], "dtype": arrays[name].dtype.name})
        for name in sorted(arrays)
    }


def require_finite(arrays: Arrays, prefix: str = "") -> None:
    """Raises ValueError for an array with values that are not finite, as an overflow of float16 leaves them."""
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ValueError(f"{prefix}{name} has values that are not finite")


def described(specs: Specs) -> str:
    """Specs in words."""
    return ", ".join(f"{name} {spec}" for name, spec in specs.items())


def _array(suffix: str, part: memoryview) -> NDArray[Any]:
    """The array of an .npy file, a view of its bytes."""
    header = io.BytesIO(part[:HEADER_BYTES])
    try:
        if not suffix.endswith(".npy"):
            raise ValueError("it is not a .npy file")
        if (version := np.lib.format.read_magic(header)) != (1, 0):
            raise ValueError(f"npy version {version}")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(header)
        return np.frombuffer(part[header.tell() :], dtype).reshape(shape, order="F" if fortran_order else "C")
    except ValueError as error:
        raise ValueError(f"part {suffix} is not an array: {error}") from error
