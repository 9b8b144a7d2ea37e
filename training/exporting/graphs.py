"""Torch modules as ONNX graphs: traced with every input per row, weights stored small, checked against torch."""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes.common import DeduplicateInitializersPass
from onnxscript.optimizer import fold_constants, remove_unused_nodes
from torch import Tensor, nn
from torch.onnx import ONNXProgram

from engines.backends.base import STEP_INPUT, STEP_ROWS, STEP_SCALARS
from engines.weights import Writer, bytes_of, half_scales, value_of
from training.diffusion import blend_known, ddim_step, expand
from training.guidance import Condition, of_rows
from training.networks import NetworkDenoiser

Weights = Literal["fp32", "fp16", "int8"]
SMALLEST_FIRST: tuple[Weights, ...] = ("int8", "fp16", "fp32")
TOLERANCE: Mapping[Weights, float] = {"fp32": 1e-4, "fp16": 2e-3, "int8": 3.5e-2}
"""The largest relative L2 error of a row of a graph's output against torch, by how its weights are stored."""

BATCH_SIZES = (1, 2, 5, 16)
MIN_COMPRESSED_ELEMENTS = 1024
INT8_BLOCKS = (48, 23)
"""The sizes tried for blocks of weights that share a scale, from the largest down to above the last."""
OPSET = 20
LARGEST_GRAPH_BYTES = 1 << 30
STORED_BYTES: Mapping[Weights, float] = {"fp32": 4, "fp16": 2, "int8": 1 + 2 / INT8_BLOCKS[1]}
"""What a weight takes; of int8, with its share of a scale, at most."""


class ExportError(Exception):
    """A graph that could not be made, or that differs from torch by more than the tolerance."""


class StepGraph(nn.Module):
    """One student step with the sampler inside: predict, convert, DDIM step, put the known region back.

    z_next = keep (alpha_next known + sigma_next noise) + (1 - keep) (alpha_next x + sigma_next eps), per row.
    """

    numbers: Tensor | None

    def __init__(
        self,
        denoiser: NetworkDenoiser,
        conditions: Sequence[str],
        numbers: Tensor | None = None,
        constants: Condition | None = None,
    ) -> None:
        """`conditions` names the condition arrays in the order of the graph's inputs.

        `numbers` (K,) are those that the denoiser has for K classes. With them the input `label` is a class's place
        among the K; without, it is the denoiser's own number. `constants` are conditions of one row, without a batch
        dimension, that are the same for all: no inputs.
        """
        super().__init__()
        self.denoiser, self.conditions, self.constants = denoiser, tuple(conditions), tuple(constants or ())
        self.register_buffer("numbers", numbers)
        for name, value in (constants or {}).items():
            self.register_buffer(name, value)

    @property
    def input_names(self) -> tuple[str, ...]:
        """The names of the inputs of `forward`, in order."""
        return (STEP_INPUT, *STEP_SCALARS, *self.conditions, *STEP_ROWS[1:])

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return z_next (B, c, h, w) of the inputs named by `input_names`."""
        given = dict(zip(self.input_names, inputs, strict=True))
        z = given["z"]
        alpha, sigma, alpha_next, sigma_next = (
            expand(given[name], z) for name in ("alpha", "sigma", "alpha_next", "sigma_next")
        )
        condition = {name: given[name] for name in self.conditions}
        condition |= {name: of_rows(getattr(self, name), z) for name in self.constants}
        if self.numbers is not None:
            condition["label"] = self.numbers.index_select(0, condition["label"])
        v = self.denoiser(z, given["time"], condition, given["guidance"])
        stepped = ddim_step(z, v, alpha, sigma, alpha_next, sigma_next)
        return blend_known(stepped, given["known"], given["keep"], given["noise"], alpha_next, sigma_next)


@dataclass(frozen=True)
class Example:
    """Named example inputs of a graph; `at(batch)` makes them for a batch size, different at each.

    They come in the order of `input_names`.
    """

    at: Callable[[int], tuple[Tensor, ...]]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]


Runner = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Runs a graph on its named inputs, and gives its named outputs."""


@dataclass(frozen=True)
class Parity:
    """How far a graph is from torch: how its weights are stored, and the relative L2 error of the worst row."""

    graph: str
    weights: Weights
    error: float


class Tracer:
    """Writes modules as graphs. One of the same make as the one before is not traced anew: its weights are put in.

    So the students of a run, which differ in nothing else, are traced once.
    """

    def __init__(self) -> None:
        """Nothing is traced yet."""
        self._make: object = None
        self._program: ONNXProgram | None = None

    def write(self, module: nn.Module, example: Example, path: Path) -> None:
        """Write the module's graph, all weights in a file beside it."""
        weights = module.state_dict()
        shapes = {name: (value.shape, value.dtype) for name, value in weights.items()}
        make = type(module), shapes, example.input_names, example.output_names
        with quiet(), torch.no_grad():
            if self._program is None or self._make != make:
                self._make, self._program = make, _trace(module, example)
            # What is folded with weights, and which of them are alike, is true of this module alone.
            graph = self._program.model.clone()
            written = ONNXProgram(graph, None)
            written.apply_weights(weights)
            fold_constants(graph)
            remove_unused_nodes(graph)
            DeduplicateInitializersPass()(graph)
            written.save(path, external_data=True)


def export_graph(
    module: nn.Module,
    example: Example,
    path: Path,
    weights: Sequence[Weights] = SMALLEST_FIRST,
    tracer: Tracer | None = None,
) -> Parity:
    """Write `module` as an ONNX graph with the first storage of `weights` that stays within its tolerance.

    A tracer that wrote a module of the same make before spares the time of another trace.

    Weights of more than `LARGEST_GRAPH_BYTES` go to files beside it (`engines.weights`). They pass through memory one
    by one, so that there is no second copy of them. Raises ExportError, and writes nothing, if no storage will do.
    """
    check_finite(module, path.name)
    large = sum(weight.nbytes for weight in module.state_dict().values()) > LARGEST_GRAPH_BYTES
    found = []
    with TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
        traced = Path(scratch) / "traced.onnx"
        (tracer or Tracer()).write(module, example, traced)
        for storage in weights:
            folder = Path(scratch) / storage
            folder.mkdir()
            written = write_graph(traced, folder / path.name, storage)
            error = worst_error(module, example, _runner(written, large))
            if error <= TOLERANCE[storage]:
                for file in folder.iterdir():
                    file.replace(path.with_name(file.name))
                return Parity(path.name, storage, error)
            shutil.rmtree(folder)
            found.append(f"{storage}: {error:.2g} > {TOLERANCE[storage]:.2g}")
    raise ExportError(f"{path.name} differs from torch: relative error {', '.join(found)}")


def check_finite(module: nn.Module, name: str) -> None:
    """Raise ExportError for a network with weights that are not finite."""
    if not all(value.isfinite().all() for value in module.state_dict().values()):
        raise ExportError(f"{name}: its network has weights that are not finite")


def _trace(module: nn.Module, example: Example) -> ONNXProgram:
    """The module's graph as it is traced, without its weights."""
    # A bound of the trace alone: diffusers' upsampling branches at 64 rows, and the exporter would trace a second time.
    batch = torch.export.Dim("batch", min=1, max=63)
    inputs = example.at(3)
    shapes = tuple({0: batch} for _ in inputs)
    program = torch.onnx.export(
        module.eval(),
        inputs,
        input_names=list(example.input_names),
        output_names=list(example.output_names),
        dynamic_shapes=(shapes,) if isinstance(module, StepGraph) else shapes,
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
        optimize=False,
    )
    assert program is not None
    program.exported_program = None  # It holds the weights.
    for name in module.state_dict().keys() & program.model.graph.initializers.keys():
        program.model.graph.initializers[name].const_value = None
    program.optimize()  # Most of it needs no weights, and is done once for all modules of a make.
    return program


def _without_notes(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model less what the exporter notes on every node: stack traces, which double the size of a small graph."""
    del model.metadata_props[:], model.graph.metadata_props[:]
    for part in (model.graph.node, model.graph.value_info, model.graph.initializer):
        for item in part:
            item.doc_string = ""
            del item.metadata_props[:]
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter: it warns of packages that are not needed and of constants that it does not fold."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _runner(graph: Path, large: bool) -> Runner:
    """A graph on ONNX Runtime. The weights of a large one stay as they are stored, and are not laid out for speed."""
    options = onnxruntime.SessionOptions()
    if large:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])

    names = [output.name for output in session.get_outputs()]

    def run(inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        given = session.run(names, {name: value.numpy() for name, value in inputs.items()})
        return dict(zip(names, map(torch.from_numpy, given), strict=True))

    return run


def worst_error(module: nn.Module, example: Example, run: Runner) -> float:
    """The largest relative L2 error of a row of what `run` gives against what torch does.

    Over the batch sizes and the outputs; infinite where one is not finite.
    """
    errors = []
    for batch in BATCH_SIZES:
        inputs = example.at(batch)
        with torch.inference_mode():
            expected = named_outputs(module, inputs, example.output_names)
            actual = run(dict(zip(example.input_names, inputs, strict=True)))
        errors += [worst_row(actual[name], value) for name, value in expected.items()]
    return max(errors)


def named_outputs(module: nn.Module, inputs: Sequence[Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """What a module that gives one tensor, or several, gives of `inputs`, by name."""
    outputs = module(*inputs)
    return dict(zip(names, (outputs,) if isinstance(outputs, Tensor) else outputs, strict=True))


def worst_row(actual: Tensor, expected: Tensor) -> float:
    """The largest relative L2 error of a row; infinite where one is not finite. Raises ExportError for other shapes."""
    if actual.shape != expected.shape:
        raise ExportError(f"a graph gives {tuple(actual.shape)} where torch gives {tuple(expected.shape)}")
    error = (actual - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    return float(error.max()) if error.isfinite().all() else float("inf")


def write_graph(source: Path, target: Path, weights: Weights) -> Path:
    """Write a graph anew with its large float32 weights as they are, as fp16, or as int8 with a scale per block.

    It computes in float32: it casts (and scales) the weights back, which a runtime does once, when it loads. Returns
    `target`.
    """
    model = _without_notes(onnx.load(source, load_external_data=False))
    writer = Writer(target, outside=bytes_of(model) * STORED_BYTES[weights] / 4 > LARGEST_GRAPH_BYTES)
    graph = model.graph
    nodes, initializers = [], []
    for initializer in graph.initializer:
        value = value_of(initializer, source.parent)
        if initializer.data_type != TensorProto.FLOAT or value.size < MIN_COMPRESSED_ELEMENTS:
            initializers.append(writer.add(initializer.name, value, initializer.data_type, initializer.dims))
            continue
        made, restore = _STORES[weights](initializer.name, value, writer)
        initializers += made
        nodes += restore
    rest = list(graph.node)
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes + rest)
    graph.initializer.extend(initializers)
    onnx.save(model, target)
    onnx.checker.check_model(str(target))
    return target


Stored = tuple[list[TensorProto], list[onnx.NodeProto]]


def _as_fp32(name: str, value: NDArray[np.float32], writer: Writer) -> Stored:
    return [writer.add(name, value, TensorProto.FLOAT, value.shape)], []


def _as_fp16(name: str, value: NDArray[np.float32], writer: Writer) -> Stored:
    half = writer.add(f"{name}.fp16", value.astype(np.float16), TensorProto.FLOAT16, value.shape)
    return [half], [helper.make_node("Cast", [half.name], [name], to=TensorProto.FLOAT)]


def _as_int8(name: str, value: NDArray[np.float32], writer: Writer) -> Stored:
    """Symmetric, with a scale for each block of consecutive weights: a text encoder's outliers need small blocks."""
    block = next((size for size in range(*INT8_BLOCKS, -1) if value.size % size == 0), None)
    if block is None:
        return _as_fp16(name, value, writer)
    blocks = value.reshape(-1, block)
    scale = half_scales(np.abs(blocks).max(axis=1, keepdims=True), 127)
    codes = np.clip(np.rint(blocks / scale.astype(np.float32)), -127, 127).astype(np.int8)
    cast = TensorProto.FLOAT
    made = [
        writer.add(f"{name}.int8", codes, TensorProto.INT8, codes.shape),
        writer.add(f"{name}.scale", scale, TensorProto.FLOAT16, scale.shape),
        numpy_helper.from_array(np.array(value.shape, np.int64), f"{name}.shape"),
    ]
    return made, [
        helper.make_node("Cast", [f"{name}.int8"], [f"{name}.codes"], to=cast),
        helper.make_node("Cast", [f"{name}.scale"], [f"{name}.scales"], to=cast),
        helper.make_node("Mul", [f"{name}.codes", f"{name}.scales"], [f"{name}.blocks"]),
        helper.make_node("Reshape", [f"{name}.blocks", f"{name}.shape"], [name]),
    ]


_STORES: Mapping[Weights, Callable[[str, NDArray[np.float32], Writer], Stored]] = {
    "fp32": _as_fp32,
    "fp16": _as_fp16,
    "int8": _as_int8,
}
