"""What only the ONNX Runtime backend must do: refuse graphs that are not what the manifest says."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from engines.backends import open_engine, ort
from engines.backends.base import EngineError, EngineOptions, GraphSpec, TensorSpec
from engines.bundle import Bundle
from engines.plans import Precision
from tests.bundles import GraphBuilder


def spec(name: str, *shape: int | str, dtype: Any = "float32") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


IMAGE = spec("image", "batch", 3, 8, 8)
LATENT = spec("latent", "batch", 3, 8, 8)


@pytest.fixture
def graph(tmp_path: Path) -> GraphSpec:
    builder = GraphBuilder()
    builder.op("Identity", "image", out="latent")
    path = builder.save(tmp_path / "encode.onnx", (IMAGE,), (LATENT,))
    return GraphSpec("encode", path, (IMAGE,), (LATENT,))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"inputs": (spec("picture", "batch", 3, 8, 8),)}, "inputs are image; the manifest wants picture"),
        ({"inputs": (IMAGE, spec("mask", "batch"))}, "wants image, mask"),
        ({"inputs": (spec("image", "batch", 3, 16, 16),)}, "input image"),
        ({"inputs": (spec("image", 1, 3, 8, 8),)}, None),
        ({"inputs": (spec("image", "batch", "c", 8, 8),)}, "input image"),
        ({"inputs": (spec("image", "batch", 3, 64),)}, "input image"),
        ({"inputs": (spec("image", "batch", 3, 8, 8, dtype="int64"),)}, "input image"),
        ({"outputs": (spec("z", "batch", 3, 8, 8),)}, "outputs are latent"),
        ({"outputs": (spec("latent", "batch", 4, 8, 8),)}, "output latent"),
    ],
)
def test_a_graph_that_differs_does_not_load(graph: GraphSpec, change: Any, named: str | None) -> None:
    """A dimension that the graph leaves open fits any fixed size; everything else must agree."""
    wanted = replace(graph, **change)
    if named is None:
        open_engine("ort", wanted, EngineOptions(threads=1))
        return
    with pytest.raises(EngineError, match=named):
        open_engine("ort", wanted, EngineOptions(threads=1))


def test_output_of_another_shape_than_promised_is_an_error(tmp_path: Path) -> None:
    """The graph drops the columns that are wholly 0, so only a run can tell its width."""
    builder = GraphBuilder()
    column_sums = builder.op("ReduceSum", "image", builder.constant([0, 1, 2], "int64"), keepdims=0)
    filled = builder.op("Cast", column_sums, to=TensorProto.BOOL)
    builder.op("Compress", "image", filled, out="latent", axis=3)
    path = builder.save(tmp_path / "encode.onnx", (IMAGE,), (spec("latent", "batch", 3, 8, "width"),))
    with open_engine("ort", GraphSpec("encode", path, (IMAGE,), (LATENT,)), EngineOptions(threads=1)) as engine:
        assert engine.run({"image": np.ones((2, 3, 8, 8), np.float32)})["latent"].shape == (2, 3, 8, 8)
        with pytest.raises(EngineError, match="wrong output"):
            engine.warmup((1,))


def test_a_graph_that_fails_while_running_is_an_engine_error(tmp_path: Path) -> None:
    builder = GraphBuilder()
    table = builder.constant([[1.0], [2.0]])
    builder.op("Gather", table, "label", out="context")
    label, context = spec("label", "batch", dtype="int64"), spec("context", "batch", 1)
    path = builder.save(tmp_path / "text.onnx", (label,), (context,))
    with open_engine("ort", GraphSpec("text", path, (label,), (context,)), EngineOptions(threads=1)) as engine:
        assert engine.run({"label": np.array([1])})["context"].tolist() == [[2.0]]
        with pytest.raises(EngineError, match=r"text\.onnx"):
            engine.run({"label": np.array([7])})


def test_a_file_that_is_no_graph_does_not_load(graph: GraphSpec) -> None:
    graph.path.write_bytes(b"not a graph")
    with pytest.raises(EngineError, match=r"encode\.onnx: ONNX Runtime cannot load it"):
        open_engine("ort", graph)


def test_int8_weights_are_unpacked_at_load(tmp_path: Path) -> None:
    """Weights stored as int8 with a scale give what the same weights in float32 give."""
    weight = np.random.default_rng(0).integers(-127, 128, (3, 3, 1, 1))
    scale = np.array([0.01, 0.02, 0.03])
    builder = GraphBuilder()
    packed, scales = builder.constant(weight, "int8"), builder.constant(scale)
    unpacked = builder.op("DequantizeLinear", packed, scales, axis=0)
    builder.op("Conv", "image", unpacked, out="latent")
    path = builder.save(tmp_path / "encode.onnx", (IMAGE,), (LATENT,))
    image = np.random.default_rng(1).standard_normal((2, 3, 8, 8)).astype(np.float32)
    with open_engine("ort", GraphSpec("encode", path, (IMAGE,), (LATENT,)), EngineOptions(threads=1)) as engine:
        latent = engine.run({"image": image})["latent"]
    expected = np.einsum("oi,bihw->bohw", weight[:, :, 0, 0] * scale[:, None], image)
    np.testing.assert_allclose(latent, expected, atol=1e-4)
    assert TensorProto.INT8 in {tensor.data_type for tensor in builder.constants}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_tensorrt_provider_is_given_the_precision_by_the_graph_alone(
    text_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    """Its own settings for a precision would override the types of the graph's tensors."""
    given: list[tuple[set[int], dict[str, str]]] = []

    def load(path: Path, options: Any, providers: list[Any]) -> Any:
        types = {node.attribute[0].i for node in onnx.load(path).graph.node if node.op_type == "Cast"}
        given.append((types, providers[0][1]))
        raise EngineError("there is no device")

    monkeypatch.setattr(ort.ort, "get_available_providers", lambda: [ort.TENSORRT])
    monkeypatch.setattr(ort, "load_session", load)
    graph = text_bundle.graphs()["step-1.onnx"]
    with pytest.raises(EngineError, match="no device"):
        ort.OrtTensorrtEngine(graph, EngineOptions(precision=precision, plans=tmp_path))
    ((types, settings),) = given
    lowered = {"fp32": set(), "fp16": {TensorProto.FLOAT16}, "bf16": {TensorProto.BFLOAT16}}[precision]
    assert types & {TensorProto.FLOAT16, TensorProto.BFLOAT16} == lowered
    assert not [name for name in settings if name.endswith(("fp16_enable", "bf16_enable", "int8_enable"))]


def test_cudas_provider_keeps_float32_whole_and_refuses_what_it_has_no_kernels_for(
    text_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen on an H100: in TF32 a row depends on its company by 1.5e-4; a graph in bf16 stops at its Resize."""
    given: list[Any] = []

    def load(path: Path, options: Any, providers: list[Any]) -> Any:
        given.extend(providers)
        raise EngineError("there is no device")

    monkeypatch.setattr(ort.ort, "get_available_providers", lambda: [ort.CUDA, ort.TENSORRT])
    monkeypatch.setattr(ort, "load_session", load)
    graph = text_bundle.graphs()["step-1.onnx"]
    for engine in (ort.OrtCudaEngine, ort.OrtTensorrtEngine):
        given.clear()
        with pytest.raises(EngineError, match="no device"):
            engine(graph, EngineOptions(plans=tmp_path))
        assert (ort.CUDA, {"use_tf32": "0"}) in given
    with pytest.raises(EngineError, match=r"CUDAExecutionProvider computes in fp32, fp16, not in bf16"):
        ort.OrtCudaEngine(graph, EngineOptions(precision="bf16"))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The threads of the session of each run."""
    noted: list[int] = []
    load = ort.load_session

    class Noted:
        def __init__(self, session: Any, threads: int) -> None:
            self._session, self._threads = session, threads

        def __getattr__(self, name: str) -> Any:
            return getattr(self._session, name)

        def run(self, *arguments: Any) -> Any:
            noted.append(self._threads)
            return self._session.run(*arguments)

    def noting(path: Path, options: Any) -> Any:
        return Noted(load(path, options), options.intra_op_num_threads)

    monkeypatch.setattr(ort, "load_session", noting)
    return noted


def images(rows: int) -> dict[str, Any]:
    return {"image": np.random.default_rng(rows).standard_normal((rows, 3, 8, 8)).astype(np.float32)}


def test_a_row_that_runs_alone_has_threads_of_its_own(graph: GraphSpec, runs: list[int]) -> None:
    with open_engine("ort", graph, EngineOptions(threads=1, lone_threads=2)) as engine:
        for rows in (1, 2, 1):
            np.testing.assert_array_equal(engine.run(images(rows))["latent"], images(rows)["image"])
    assert runs == [2, 1, 2]
    with pytest.raises(EngineError, match="closed"):
        engine.run(images(1))


def test_a_row_beside_another_run_has_not(graph: GraphSpec, runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another engine's runs count too: the text encoder's, say, beside the steps."""
    began, ends = Event(), Event()
    check = ort.OrtEngine._run

    def held(engine: Any, inputs: Any, batch: int) -> Any:
        if batch != 3:
            return check(engine, inputs, batch)
        with ort._company.joined():
            began.set()
            ends.wait(10)
        return check(engine, inputs, batch)

    monkeypatch.setattr(ort.OrtEngine, "_run", held)
    options = EngineOptions(threads=1, lone_threads=2)
    with open_engine("ort", graph, options) as one, open_engine("ort", graph, options) as other:
        with ThreadPoolExecutor(1) as pool:
            beside = pool.submit(other.run, images(3))
            assert began.wait(10)
            one.run(images(1))
            ends.set()
            beside.result()
        one.run(images(1))
    assert runs == [1, 1, 2]


def test_a_run_that_fails_is_no_company(graph: GraphSpec, runs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    with open_engine("ort", graph, EngineOptions(threads=1, lone_threads=2)) as engine:
        with monkeypatch.context() as patched:
            patched.setattr(type(engine._session), "run", broken)  # type: ignore[attr-defined]
            with pytest.raises(EngineError, match="no more"):
                engine.run(images(2))
        engine.run(images(1))
    assert runs == [2]


def broken(*arguments: Any) -> Any:
    raise RuntimeError("no more")


@pytest.mark.parametrize("options", [EngineOptions(threads=2, lone_threads=2), EngineOptions(threads=2)])
def test_a_graph_is_held_once_where_more_threads_are_not_asked_for(
    graph: GraphSpec, runs: list[int], options: EngineOptions
) -> None:
    with open_engine("ort", graph, options) as engine:
        engine.run(images(1))
        assert engine._lone is None  # type: ignore[attr-defined]
    assert runs == [2]
