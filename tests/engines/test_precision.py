"""Graphs in fp16 and bf16: which operators are cast, which never, and how far the result is from fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from engines.bundle import load_bundle, shipped_bundle
from engines.compile import unpack
from engines.fidelity import typical_inputs
from engines.plans import Precision
from engines.precision import NORMS, PRODUCTS, _bfloat16, cast, emulate

LOW = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelProto]:
    """The graphs of the bundle that ships, their weights unpacked."""
    folder = tmp_path_factory.mktemp("unpacked")
    bundle = load_bundle(shipped_bundle())
    return {name: onnx.load(unpack(graph, folder / name)) for name, graph in bundle.graphs().items()}


def types(model: ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model).graph
    infos = [*graph.input, *graph.value_info, *graph.output]
    found = {info.name: info.type.tensor_type.elem_type for info in infos}
    return found | {initializer.name: initializer.data_type for initializer in graph.initializer}


def of_kind(model: ModelProto, kinds: frozenset[str] | set[str]) -> Iterator[NodeProto]:
    return (node for node in model.graph.node if node.op_type in kinds)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["text.onnx", "encode.onnx", "decode.onnx", "step-4.onnx"])
def test_products_are_cast_and_norms_are_not(graphs: dict[str, ModelProto], name: str, precision: Precision) -> None:
    lowered = cast(graphs[name], precision)
    onnx.checker.check_model(lowered, full_check=True)
    typed = types(lowered)
    assert {typed[node.output[0]] for node in of_kind(lowered, PRODUCTS)} == {LOW[precision]}
    whole = of_kind(lowered, NORMS | {"Softmax", "Sin", "Cos", "Exp"})
    assert {typed[node.output[0]] for node in whole} == {TensorProto.FLOAT}
    for before, after in zip(
        [*graphs[name].graph.input, *graphs[name].graph.output],
        [*lowered.graph.input, *lowered.graph.output],
        strict=True,
    ):
        assert before == after
    assert lowered.ByteSize() < 0.8 * graphs[name].ByteSize()


def test_the_samplers_arithmetic_stays_whole(graphs: dict[str, ModelProto]) -> None:
    lowered = cast(graphs["step-4.onnx"], "fp16")
    typed = types(lowered)
    last = [node for node in lowered.graph.node if node.op_type == "Conv"][-1]
    after = {last.output[0]}
    tail = [node for node in lowered.graph.node if after & set(node.input) and not after.update(node.output)]
    assert next(node.op_type for node in tail) == "Cast"
    assert len(tail) > 5
    assert {typed[node.output[0]] for node in tail} == {TensorProto.FLOAT}


@pytest.mark.parametrize("name", ["text.onnx", "encode.onnx", "decode.onnx", "step-1.onnx", "step-4.onnx"])
def test_lower_precisions_are_near(graphs: dict[str, ModelProto], name: str, tmp_path: Path) -> None:
    inputs = typical_inputs(load_bundle(shipped_bundle()).graphs()[name], 3)
    whole = run(graphs[name], inputs, tmp_path)
    half = run(cast(graphs[name], "fp16"), inputs, tmp_path)
    rounded, coarse = (run(emulate(graphs[name], precision), inputs, tmp_path) for precision in ("fp16", "bf16"))
    errors = [np.linalg.norm(whole - other) / np.linalg.norm(whole) for other in (half, rounded, coarse)]
    assert max(errors[:2]) < 3e-3
    assert errors[1] < errors[2] < 3e-2
    assert errors[1] > 1e-6


def test_values_that_do_not_fit_are_found(tmp_path: Path) -> None:
    """On a CPU, fp16 products are computed in fp32: only the emulation shows what overflows."""
    weights = [numpy_helper.from_array(np.eye(4, dtype=np.float32) * factor, name) for name, factor in
               (("up", 1e4), ("down", 1e-4))]  # fmt: skip
    nodes = [helper.make_node("MatMul", ["x", "up"], ["a"]), helper.make_node("MatMul", ["a", "down"], ["y"])]
    model, x = graph_of(nodes, weights), np.full((4, 4), 8, np.float32)
    assert np.isfinite(run(emulate(model, "bf16"), {"x": x}, tmp_path)).all()
    assert not np.isfinite(run(emulate(model, "fp16"), {"x": x}, tmp_path)).all()


NORMALISATIONS = {
    "RMSNorm, as the exporter writes it": [
        ("Pow", "a two", "squares"), ("ReduceMean", "squares axes", "mean"), ("Add", "mean epsilon", "shifted"),
        ("Sqrt", "shifted", "root"), ("Reciprocal", "root", "factor"), ("Mul", "a factor", "normal"),
        ("Mul", "normal scale", "b"),
    ],
    "mean and variance by hand": [
        ("ReduceMean", "a axes", "centre"), ("Sub", "a centre", "centred"), ("Mul", "centred centred", "squares"),
        ("ReduceMean", "squares axes", "mean"), ("Add", "mean epsilon", "shifted"), ("Sqrt", "shifted", "root"),
        ("Div", "centred root", "normal"), ("Mul", "normal scale", "b"),
    ],
    "a mean of squares by hand": [
        ("Mul", "a a", "squares"), ("ReduceMean", "squares axes", "mean"), ("Add", "mean epsilon", "shifted"),
        ("Sqrt", "shifted", "root"), ("Div", "a root", "b"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("written", NORMALISATIONS.values(), ids=list(NORMALISATIONS))
def test_normalisations_that_are_written_out_stay_whole(written: list[tuple[str, str, str]], tmp_path: Path) -> None:
    """Squares of some hundreds are beyond fp16."""
    numbers = {"first": np.eye(4) * 300, "two": 2, "epsilon": 1e-6, "scale": np.ones(4), "last": np.eye(4)}
    weights = [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in numbers.items()]
    weights.append(numpy_helper.from_array(np.array([1], np.int64), "axes"))
    steps = [("MatMul", "x first", "a"), *written, ("MatMul", "b last", "y")]
    model = graph_of([helper.make_node(kind, reads.split(), [gives]) for kind, reads, gives in steps], weights)
    typed = types(cast(model, "fp16"))
    assert {typed[gives] for _, _, gives in written} == {TensorProto.FLOAT}
    assert {typed[f"{gives}.low"] for gives in ("a", "y")} == {TensorProto.FLOAT16}
    x = {"x": np.random.default_rng(0).standard_normal((4, 4), np.float32)}
    np.testing.assert_allclose(run(emulate(model, "fp16"), x, tmp_path), run(model, x, tmp_path), atol=3e-3)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("name", ["text.onnx", "decode.onnx", "step-4.onnx"])
def test_weights_of_8_bits_are_scaled_back_to_what_was_emulated(
    graphs: dict[str, ModelProto], name: str, precision: Precision, tmp_path: Path
) -> None:
    inputs = typical_inputs(load_bundle(shipped_bundle()).graphs()[name], 2)
    lowered = cast(graphs[name], precision)
    onnx.checker.check_model(lowered)
    typed = {initializer.name: initializer.data_type for initializer in lowered.graph.initializer}
    stored = TensorProto.INT8 if precision == "int8" else TensorProto.FLOAT8E4M3FN
    scaled = list(of_kind(lowered, {"DequantizeLinear"}))
    assert len(scaled) > 5
    assert {typed[node.input[0]] for node in scaled} == {stored}
    assert {typed[node.input[1]] for node in scaled} == {TensorProto.FLOAT16}
    assert lowered.ByteSize() < 0.65 * graphs[name].ByteSize()  # the words of a text encoder are not products
    whole, made, emulated = (
        run(model, inputs, tmp_path) for model in (graphs[name], lowered, emulate(graphs[name], precision))
    )
    error = np.linalg.norm(whole - made) / np.linalg.norm(whole)
    assert 1e-4 < error < 0.15
    assert np.linalg.norm(made - emulated) < 0.25 * error * np.linalg.norm(whole)


@pytest.mark.parametrize("transposed", [0, 1])
def test_every_output_channel_has_a_scale_of_its_own(transposed: int, tmp_path: Path) -> None:
    matrix = np.random.default_rng(0).standard_normal((40, 50), np.float32) * np.logspace(-3, 3, 50, dtype=np.float32)
    weight = numpy_helper.from_array(np.ascontiguousarray(matrix.T if transposed else matrix), "weight")
    model = graph_of(
        [helper.make_node("Gemm", ["x", "weight"], ["y"], transB=transposed)], [weight], ([40, 40], [40, 50])
    )
    x = np.eye(40, dtype=np.float32)
    found = run(cast(model, "int8"), {"x": x}, tmp_path)
    step = np.abs(matrix).max(axis=0) / 127
    assert (np.abs(found - matrix) < 0.6 * step + 1e-3 * np.abs(matrix)).all()


def test_an_old_graph_cannot_have_weights_of_8_bits() -> None:
    model = graph_of([helper.make_node("Relu", ["x"], ["y"])])
    model.opset_import[0].version = 17
    with pytest.raises(ValueError, match="a graph of opset 17 cannot have fp8 weights"):
        cast(model, "fp8")


@pytest.mark.parametrize("lower", [cast, emulate])
def test_an_old_graph_cannot_be_in_bfloat16(lower: Callable[[ModelProto, Precision], ModelProto]) -> None:
    """It would need an opset that has operators written otherwise, such as means, whose axes became an input."""
    nodes = [
        helper.make_node("MatMul", ["x", "x"], ["a"]),
        helper.make_node("ReduceMean", ["a"], ["b"], axes=[1]),
        helper.make_node("MatMul", ["a", "b"], ["y"]),
    ]
    model = graph_of(nodes, shapes=([4, 4], [4, 1]))
    model.opset_import[0].version = 17
    with pytest.raises(ValueError, match="a graph of opset 17 cannot be in bf16; one of opset 18 can"):
        lower(model, "bf16")
    onnx.checker.check_model(lower(model, "fp16"), full_check=True)


def test_a_graph_of_opset_18_can_be_in_bfloat16() -> None:
    weights = [numpy_helper.from_array(np.eye(4, dtype=np.float32), "weight")]
    weights.append(numpy_helper.from_array(np.array([1], np.int64), "axes"))
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["a"]),
        helper.make_node("Split", ["a"], ["left", "right"], axis=1, num_outputs=2),
        helper.make_node("Concat", ["right", "left"], ["b"], axis=1),
        helper.make_node("ReduceMean", ["b", "axes"], ["c"]),
        helper.make_node("Sub", ["b", "c"], ["d"]),
        helper.make_node("MatMul", ["d", "weight"], ["y"]),
    ]
    model = graph_of(nodes, weights)
    model.opset_import[0].version = 18
    onnx.checker.check_model(cast(model, "bf16"), full_check=True)


def run(model: ModelProto, inputs: dict[str, np.ndarray], folder: Path) -> np.ndarray:
    onnx.save(model, folder / "model.onnx")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    output: np.ndarray = session.run(None, inputs)[0]
    return output


def test_whole_precision_changes_nothing(graphs: dict[str, ModelProto]) -> None:
    for lower in (cast, emulate):
        assert lower(graphs["decode.onnx"], "fp32") == graphs["decode.onnx"]


def test_a_weight_that_is_read_in_both_precisions_is_there_in_both(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32) * 3, "weight")
    model = graph_of(
        [
            helper.make_node("MatMul", ["x", "weight"], ["a"]),
            helper.make_node("MatMul", ["a", "weight"], ["b"]),
            helper.make_node("Add", ["b", "weight"], ["y"]),
        ],
        [weight],
    )
    x = np.arange(16, dtype=np.float32).reshape(4, 4)
    np.testing.assert_array_equal(run(cast(model, "fp16"), {"x": x}, tmp_path), 9 * x + 3 * np.eye(4))


def test_a_type_that_cannot_be_known_is_refused() -> None:
    model = graph_of([helper.make_node("Strange", ["x"], ["a"], domain="else"), helper.make_node("Relu", ["a"], ["y"])])
    model.opset_import.append(helper.make_opsetid("else", 1))
    with pytest.raises(ValueError, match="type of a cannot"):
        cast(model, "fp16")


def graph_of(
    nodes: list[NodeProto], weights: list[TensorProto] | None = None, shapes: tuple[list[int], ...] = ([4, 4], [4, 4])
) -> ModelProto:
    value = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in zip(("x", "y"), shapes, strict=True)
    ]
    graph = helper.make_graph(nodes, "small", value[:1], value[1:], weights or [])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@given(arrays(np.float32, 16, elements=st.floats(width=32)))
@example(np.array([0x7FFFFFFF, 0xFFFFFFFF] * 8, np.uint32).view(np.float32))
def test_bfloat16_is_torchs(values: np.ndarray) -> None:
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    halves = np.zeros((16, 2), np.uint16)
    halves[:, 1] = _bfloat16(values)
    np.testing.assert_array_equal(halves.view(np.float32)[:, 0], expected)
