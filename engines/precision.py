"""Graphs in a lower precision: the casts are written into the graph, so that every runtime computes the same.

Convolutions, matrix products and what lies between them compute in fp16 or bf16. Normalisations, as one operator or
written out, softmax, the embeddings of time and guidance, and the sampler's arithmetic after the network stay in fp32.
In int8 and fp8 (E4M3) it is the weights of products that have 8 bits and a scale for each output channel; the products
themselves are fp16's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from engines.plans import Precision
from engines.weights import INSIDE, Writer, half_scales, value_of

PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
BETWEEN = PRODUCTS | {
    *("Add", "Sub", "Mul", "Sigmoid", "Gelu", "Tanh", "Relu", "Where"),
    *("Reshape", "Transpose", "Concat", "Split", "Slice", "Resize", "Squeeze", "Unsqueeze", "Expand", "Pad"),
}
NORMS = frozenset({"InstanceNormalization", "LayerNormalization", "GroupNormalization", "RMSNormalization"})
BFLOAT16_OPSET = 22
"""The first opset whose convolutions take bfloat16."""
RAISED_OPSET = 18
"""The first opset whose operators, of those here, are written as in `BFLOAT16_OPSET`: only their types are fewer."""
QUANTIZED_OPSET = 19
"""The first opset that scales 8-bit weights back to fp16."""
_TYPES = {
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
    "int8": TensorProto.FLOAT16,
    "fp8": TensorProto.FLOAT16,
}
_STORED = {"int8": (TensorProto.INT8, 127.0), "fp8": (TensorProto.FLOAT8E4M3FN, 448.0)}
"""The type of 8-bit weights, and its largest value."""
MIN_QUANTIZED = 1024
"""Weights with fewer values stay in fp16."""


def cast(model: ModelProto, precision: Precision, folder: Path = Path(), writer: Writer = INSIDE) -> ModelProto:
    """A copy of a float32 model that computes in `precision`; its inputs and outputs stay as they are.

    The weights of the cast operators are in that precision too, made one by one by `writer` of what lies in the graph,
    or outside it in `folder`. Raises ValueError for a model whose tensors' types cannot be inferred, and for one of an
    opset that is too old for the precision.
    """
    lowered = _copy(model)
    if precision == "fp32":
        return lowered
    _check_opset(lowered, precision)
    _Rewrite(lowered, precision, folder, writer).cast()
    for opset in lowered.opset_import:
        if precision == "bf16" and opset.domain == "":
            opset.version = max(opset.version, BFLOAT16_OPSET)
    return lowered


def emulate(model: ModelProto, precision: Precision, folder: Path = Path(), writer: Writer = INSIDE) -> ModelProto:
    """A copy of a float32 model that computes what `cast` would on a chip that accumulates in fp32.

    It rounds values where `cast` casts, and so needs no operator in that precision. To be run without optimisations:
    those remove the rounding.
    """
    rounded = _copy(model)
    if precision != "fp32":
        _check_opset(rounded, precision)
        _Rewrite(rounded, precision, folder, writer).round()
    return rounded


def _check_opset(model: ModelProto, precision: Precision) -> None:
    version = next((opset.version for opset in model.opset_import if opset.domain == ""), 0)
    if precision in _STORED and version < QUANTIZED_OPSET:
        raise ValueError(f"a graph of opset {version} cannot have {precision} weights; opset {QUANTIZED_OPSET} can")
    if precision == "bf16" and version < RAISED_OPSET:
        raise ValueError(f"a graph of opset {version} cannot be in bf16; one of opset {RAISED_OPSET} can")


def _copy(model: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


class _Rewrite:
    """The rewriting of one graph in place. `low` is the name of each tensor in the lower precision, once it is made."""

    def __init__(self, model: ModelProto, precision: Precision, folder: Path, writer: Writer) -> None:
        self.graph, self.folder, self.writer = model.graph, folder, writer
        self.dtype, self.stored = _TYPES[precision], _STORED.get(precision)
        self.floats = _float_tensors(model)
        self.weights = {initializer.name: initializer for initializer in self.graph.initializer}
        # A node is known by its first output: the wrappers of protobuf have no identity.
        self.lowered = {node.output[0] for node in _between_products(self.graph) if self._can_be_lowered(node)}
        self.low: dict[str, str] = {}
        self.nodes: list[NodeProto] = []

    def cast(self) -> None:
        """Have the nodes between products compute in the lower precision."""
        wanted_whole = {name for node in self.graph.node if node.output[0] not in self.lowered for name in _reads(node)}
        wanted_whole |= {output.name for output in self.graph.output}
        for node in self.graph.node:
            if node.output[0] not in self.lowered:
                self.nodes.append(node)
                continue
            self._read_low(node)
            self.nodes.append(node)
            for i, name in enumerate(node.output):
                if name:
                    node.output[i] = self.low[name] = f"{name}.low"
                    if name in wanted_whole:
                        self._append("Cast", node.output[i], name, to=TensorProto.FLOAT)
        self._finish()

    def round(self) -> None:
        """Have the nodes between products read and give values that are rounded to the lower precision."""
        for node in self.graph.node:
            if node.output[0] not in self.lowered:
                self.nodes.append(node)
                continue
            self._read_low(node, whole=True)
            self.nodes.append(node)
            for i, name in enumerate(node.output):
                if name:
                    node.output[i], self.low[name] = f"{name}.unrounded", name
                    self._round(node.output[i], name)
        self._finish()

    def _can_be_lowered(self, node: NodeProto) -> bool:
        return node.op_type in BETWEEN and all(name in self.floats for name in node.output if name)

    def _read_low(self, node: NodeProto, whole: bool = False) -> None:
        """Point the inputs of a node to their values in the lower precision, or to these as float32 again."""
        for i, name in enumerate(node.input):
            if name in self.floats and not (node.op_type == "Resize" and i > 0):  # the rest of them are sizes
                node.input[i] = self._low(name, whole, _output_channels(node, i))

    def _low(self, name: str, whole: bool, channels: int | None = None) -> str:
        if name not in self.low and self._is_quantized(name, channels):
            assert channels is not None
            self.low[name] = self._quantize(name, channels, whole)
        elif name not in self.low:
            self.low[name] = f"{name}.low"
            if name in self.weights:
                self.graph.initializer.append(self._lowered_weight(self.weights[name], self.low[name]))
                if whole:
                    self._append("Cast", self.low[name], f"{name}.rounded", to=TensorProto.FLOAT)
                    self.low[name] = f"{name}.rounded"
            elif whole:
                self._round(name, self.low[name])
            else:
                self._append("Cast", name, self.low[name], to=self.dtype)
        return self.low[name]

    def _is_quantized(self, name: str, channels: int | None) -> bool:
        """Whether this is a weight of a product, whose `channels` axis has a scale for each place."""
        if self.stored is None or channels is None or name not in self.weights:
            return False
        shape = self.weights[name].dims
        return len(shape) > channels and math.prod(shape) >= MIN_QUANTIZED

    def _quantize(self, name: str, channels: int, whole: bool) -> str:
        """Store a weight with 8 bits; its name scaled back, to fp16, or to what that is in fp32 for `whole`."""
        assert self.stored is not None
        dtype, largest = self.stored
        value = value_of(self.weights[name], self.folder)
        others = tuple(axis for axis in range(value.ndim) if axis != channels)
        scale = half_scales(np.abs(value).max(axis=others), largest)
        shape = [-1 if axis == channels else 1 for axis in range(value.ndim)]
        scaled = np.clip(value / scale.astype(np.float32).reshape(shape), -largest, largest)
        whole_numbers = np.rint(scaled) if dtype == TensorProto.INT8 else scaled
        codes = whole_numbers.astype(helper.tensor_dtype_to_np_dtype(dtype))
        if whole:
            back = codes.astype(np.float16) * scale.reshape(shape)
            self.graph.initializer.append(
                self.writer.add(f"{name}.rounded", back.astype(np.float32), TensorProto.FLOAT, value.shape)
            )
            return f"{name}.rounded"
        self.graph.initializer.append(self.writer.add(f"{name}.codes", codes.tobytes(), dtype, value.shape))
        self.graph.initializer.append(self.writer.add(f"{name}.scale", scale, TensorProto.FLOAT16, scale.shape))
        self.nodes.append(
            helper.make_node("DequantizeLinear", [f"{name}.codes", f"{name}.scale"], [f"{name}.low"], axis=channels)
        )
        return f"{name}.low"

    def _lowered_weight(self, weight: TensorProto, name: str) -> TensorProto:
        value = value_of(weight, self.folder)
        lowered = value.astype(np.float16) if self.dtype == TensorProto.FLOAT16 else _bfloat16(value)
        return self.writer.add(name, lowered, self.dtype, weight.dims)

    def _round(self, source: str, target: str) -> None:
        """There and back. The node between them keeps a runtime from taking the two casts for none."""
        self._append("Cast", source, f"{target}.there", to=self.dtype)
        self._append("Identity", f"{target}.there", f"{target}.held")
        self._append("Cast", f"{target}.held", target, to=TensorProto.FLOAT)

    def _append(self, kind: str, source: str, target: str, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(kind, [source], [target], name=f"{kind} to {target}", **attributes))

    def _finish(self) -> None:
        read = {name for node in self.nodes for name in _reads(node)} | {output.name for output in self.graph.output}
        kept = [initializer for initializer in self.graph.initializer if initializer.name in read]
        del self.graph.node[:], self.graph.initializer[:], self.graph.value_info[:]
        self.graph.node.extend(self.nodes)
        self.graph.initializer.extend(kept)


def _bfloat16(
    value: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint16]]:
    """The upper halves of float32 values, rounded to nearest, ties to even. Infinities and NaNs stay what they are."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(value), 0x7FC0, rounded).astype(np.uint16)


def _float_tensors(model: ModelProto) -> set[str]:
    """The names of the float32 tensors of a graph."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=False)
    typed = {info.name: info.type.tensor_type.elem_type for info in _infos(inferred.graph)}
    typed |= {initializer.name: initializer.data_type for initializer in inferred.graph.initializer}
    unknown = [name for node in inferred.graph.node for name in node.output if name and not typed.get(name)]
    if unknown:
        raise ValueError(f"the type of {unknown[0]} cannot be inferred")
    return {name for name, dtype in typed.items() if dtype == TensorProto.FLOAT}


def _infos(graph: GraphProto) -> Iterator[onnx.ValueInfoProto]:
    yield from graph.input
    yield from graph.value_info
    yield from graph.output


def _between_products(graph: GraphProto) -> list[NodeProto]:
    """Products, and the nodes that have products before and after them, less what normalisations are made of."""
    norms = _normalised(graph) | _reduced_only(graph)
    after: set[str] = set()  # tensors that depend on a product
    candidates: list[NodeProto] = []
    for node in graph.node:
        if node.op_type in PRODUCTS or after & set(_reads(node)):
            after.update(node.output)
            if node.output[0] not in norms:
                candidates.append(node)
    before: set[str] = set()  # tensors that a product depends on
    for node in reversed(graph.node):
        if node.op_type in PRODUCTS or before & set(node.output):
            before.update(_reads(node))
    return [node for node in candidates if node.op_type in PRODUCTS or before & set(node.output)]


def _normalised(graph: GraphProto) -> set[str]:
    """Tensors that are a normalisation's: its statistics, what they are applied to, and that reshaped or scaled."""
    weights = {initializer.name for initializer in graph.initializer}
    statistics: set[str] = set()
    norm: set[str] = set()
    for node in graph.node:
        reads = set(_reads(node))
        if node.op_type in PRODUCTS:
            continue
        if node.op_type in NORMS:
            norm.update(node.output)
        elif _reduces(node) or (reads & statistics and reads <= statistics | weights):
            statistics.update(node.output)
        elif reads & statistics or _ends(node, norm, weights):
            norm.update(node.output)
    return statistics | norm


def _reduced_only(graph: GraphProto) -> set[str]:
    """Tensors that nothing but reductions read, directly or through such tensors: squares, of which there is a mean."""
    reduced: set[str] = set()
    read = {output.name for output in graph.output}  # by anything else
    for node in reversed(graph.node):
        if not _reduces(node):
            if node.op_type in PRODUCTS or read & set(node.output):
                read.update(_reads(node))
            else:
                reduced.update(node.output)
    return reduced


def _reduces(node: NodeProto) -> bool:
    return node.op_type.startswith("Reduce")


def _ends(node: NodeProto, norm: set[str], weights: set[str]) -> bool:
    """Whether a node is the end of a normalisation: back to its shape, scale or shift by a weight."""
    if node.op_type == "Reshape":
        return node.input[0] in norm
    return (
        node.op_type in ("Mul", "Add")
        and not norm.isdisjoint(node.input)
        and all(name in norm or name in weights for name in node.input)
    )


def _output_channels(node: NodeProto, place: int) -> int | None:
    """The axis of a product's weight, its second input, along which its output channels lie; None for all else."""
    attributes = {attribute.name: attribute.i for attribute in node.attribute if attribute.name in ("transB", "group")}
    grouped = node.op_type == "ConvTranspose" and attributes.get("group", 1) > 1
    if node.op_type not in PRODUCTS or place != 1 or grouped:
        return None
    last = 0 if attributes.get("transB") else 1
    return {"Conv": 0, "ConvTranspose": 1, "MatMul": 1, "Gemm": last}[node.op_type]


def _reads(node: NodeProto) -> Iterator[str]:
    """What a node reads, its branches and loops included."""
    yield from (name for name in node.input if name)
    for attribute in node.attribute:
        for graph in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
            for inner in graph.node:
                yield from _reads(inner)
            yield from (output.name for output in graph.output)
