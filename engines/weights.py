"""Weights of ONNX graphs that lie outside the graph: mapped into memory one by one, written one by one in shards.

A graph file is a protobuf message, which ends at 2 GB; and a copy of all weights may not fit beside the first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from posixpath import normpath
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from engines.manifest import WEIGHT_BITS

SMALL_BYTES = 1024
"""Weights below this stay in the graph: they may be shapes, which inference needs to see."""
SHARD_BYTES = 1 << 30
PAGE_BYTES = 4096
SUFFIX = ".weights-"


def value_of(tensor: TensorProto, folder: Path) -> NDArray[Any]:
    """The values of a tensor of a graph in `folder`; those that lie outside the graph are mapped, not read."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor)
    place = {entry.key: entry.value for entry in tensor.external_data}
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    shape = tuple(tensor.dims)
    if not math.prod(shape):
        return np.empty(shape, dtype)
    return np.memmap(folder / place["location"], dtype, "r", int(place.get("offset", 0)), shape)


def storages(graph: Path) -> set[str]:
    """The types in which a graph holds weights: those of its floating-point initializers, and of quantized ones."""
    initializers = onnx.load(graph, load_external_data=False).graph.initializer
    types = {np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)).name for tensor in initializers}
    return types & WEIGHT_BITS.keys()


def locations(graph: Path) -> set[str]:
    """The files beside a graph that it reads weights from."""
    initializers = onnx.load(graph, load_external_data=False).graph.initializer
    outside = (tensor for tensor in initializers if tensor.data_location == TensorProto.EXTERNAL)
    return {normpath(entry.value) for tensor in outside for entry in tensor.external_data if entry.key == "location"}


def half_scales(largest: NDArray[np.float32], code: float) -> NDArray[np.float16]:
    """Scales in fp16 for weights of at most `largest` each, so that no code is beyond `code`.

    They are rounded up, and at least the smallest that fp16 has.
    """
    wanted = np.maximum(largest / np.float32(code), np.finfo(np.float16).smallest_subnormal)
    scales = wanted.astype(np.float16)
    rounded_up: NDArray[np.float16] = np.where(scales < wanted, np.nextafter(scales, np.float16(np.inf)), scales)
    return rounded_up


def bytes_of(model: onnx.ModelProto) -> int:
    """What the weights of a graph take, wherever they lie."""
    return sum(_size(tensor) for tensor in model.graph.initializer)


def _size(tensor: TensorProto) -> int:
    count: int = math.prod(tensor.dims)
    width: int = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
    return count * width


class Writer:
    """Makes tensors for the graph `path`: within it, or outside in shards beside it, each of about `SHARD_BYTES`."""

    def __init__(self, path: Path, outside: bool) -> None:
        """With `outside`, all but small weights go to files named after the graph; else nothing is written."""
        self._path, self._outside = path, outside
        self._shards: list[Path] = []

    def add(self, name: str, value: NDArray[Any] | bytes, data_type: int, shape: Sequence[int]) -> TensorProto:
        """A tensor of the given values, or of their bytes; what was added is not kept in memory if it is outside."""
        raw = value if isinstance(value, bytes) else np.ascontiguousarray(value).data
        size = len(raw) if isinstance(raw, bytes) else raw.nbytes
        tensor = TensorProto(name=name, data_type=data_type, dims=shape)
        if not self._outside or size < SMALL_BYTES:
            tensor.raw_data = bytes(raw)
            return tensor
        shard = self._shard(size)
        with shard.open("ab") as file:
            file.write(bytes(-file.tell() % PAGE_BYTES))  # a runtime maps what begins at a page
            offset = file.tell()
            file.write(raw)
        tensor.data_location = TensorProto.EXTERNAL
        for key, text in (("location", shard.name), ("offset", str(offset)), ("length", str(size))):
            tensor.external_data.add(key=key, value=text)
        return tensor

    def _shard(self, size: int) -> Path:
        """The file for so many bytes more."""
        if not self._shards or self._shards[-1].stat().st_size + size > SHARD_BYTES:
            self._shards.append(self._path.with_name(f"{self._path.name}{SUFFIX}{len(self._shards):02}"))
            self._shards[-1].touch(exist_ok=False)
        return self._shards[-1]


INSIDE = Writer(Path(), outside=False)
"""Makes tensors with their values in them."""
