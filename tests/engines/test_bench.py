"""`fewstep bench`: operations counted, backends in turn, how far apart they are."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from click.testing import CliRunner, Result

from engines import bench as benching
from engines.backends import BACKENDS
from engines.backends.base import Array, DeviceMemoryError, EngineError, EngineOptions, GraphSpec, TensorSpec
from engines.backends.fake import FakeEngine
from engines.backends.ort import OrtEngine
from engines.backends.standin import StandIn, Wanted
from engines.bench import Bench, Contender, _products, memory_bytes, peak_operations_per_second
from engines.bench_command import bench
from engines.bundle import Bundle
from engines.compile import prepare
from engines.operations import count_operations
from engines.plans import Precision
from tests.bundles import CONTEXT_DIM, MAX_TOKENS, GraphBuilder


class Built(OrtEngine):
    """What a backend has compiled: it remembers what it was asked, and doubles what it gives."""

    asked: ClassVar[list[str]] = []

    def _run(self, inputs: Mapping[str, Array], batch: int) -> dict[str, Array]:
        self.asked.append(self._name)
        return {name: 2 * array for name, array in super()._run(inputs, batch).items()}


def open_slowly(graph: GraphSpec, options: EngineOptions) -> StandIn:
    """A backend that compiles, while ONNX Runtime answers, what is not in a precision that it cannot have."""

    def make(wanted: Wanted) -> Built:
        if options.precision != "fp32":
            raise EngineError("it cannot be compiled")
        time.sleep(0.1)
        return Built(graph, options)

    return StandIn(OrtEngine(graph, replace(options, precision="fp32")), make, graph.path.name)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Contender:
    """A contender that compiles, and that is measured by the products for a CPU."""
    monkeypatch.setattr(benching, "_ON_DEVICE", ())
    monkeypatch.setitem(BACKENDS, "trt", "tests.engines.test_bench:open_slowly")
    monkeypatch.setattr(Built, "asked", [])
    return Contender("trt")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(bench, [str(argument) for argument in arguments])


def strict_json(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def spec(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=("batch", *shape))


def test_operations_are_those_of_the_products(text_bundle: Bundle) -> None:
    graphs = text_bundle.graphs()
    pixels = int(np.prod(text_bundle.manifest.latent_shape))
    assert count_operations(graphs["step-4.onnx"]) == 2 * MAX_TOKENS * CONTEXT_DIM * pixels


def test_operations_of_convolutions(tmp_path: Path) -> None:
    g = GraphBuilder()
    strided = g.op("Conv", "x", g.constant(np.ones((6, 2, 3, 3))), group=2, strides=[2, 2], pads=[1, 1, 1, 1])
    grown = g.op("ConvTranspose", strided, g.constant(np.ones((6, 5, 2, 2))), strides=[2, 2])
    flat = g.op("Flatten", grown)
    g.op("Gemm", flat, g.constant(np.ones((7, 5 * 8 * 8))), transB=1, out="y")
    inputs, outputs = (spec("x", 4, 8, 8),), (spec("y", 7),)
    graph = GraphSpec("decode", g.save(tmp_path / "g.onnx", inputs, outputs), inputs, outputs)
    convolution = 2 * (6 * 4 * 4) * (2 * 3 * 3)
    transposed = 2 * (6 * 4 * 4) * (5 * 2 * 2)
    assert count_operations(graph) == convolution + transposed + 2 * 7 * 5 * 8 * 8


def test_operations_of_an_image_are_those_of_the_runs_that_are_timed(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benching, "count_operations", lambda graph: {"text": 1000, "step": 10, "decode": 1}[graph.role])
    running = Bench(bundle, [Contender("fake")], (2,), EngineOptions(1))
    (speed,) = running.speeds(4, 1)
    assert speed.operations == 2 * (4 * 10 + (1 if bundle.manifest.space == "latent" else 0))
    running.close()


def test_a_backend_against_itself_is_no_error_and_against_another_one_is(text_bundle: Bundle) -> None:
    running = Bench(text_bundle, [Contender("ort"), Contender("fake")], (1, 2), EngineOptions(1))
    same, other = running.parities(4)
    assert (same.step_maximum, same.image_maximum, same.image_psnr_db) == (0, 0, np.inf)
    assert other.step_maximum > 0
    assert other.image_psnr_db < 40
    speeds = running.speeds(4, 2)
    assert [(str(speed.contender), speed.batch) for speed in speeds] == [
        ("ort", 1), ("fake", 1), ("ort", 2), ("fake", 2)
    ]  # fmt: skip
    assert speeds[2].operations == 2 * speeds[0].operations > 0
    assert all(speed.seconds > 0 for speed in speeds)
    running.close()


def test_the_peak_is_that_of_products_and_the_memory_that_of_a_process(text_bundle: Bundle) -> None:
    assert 1e8 < peak_operations_per_second(Contender("ort"), EngineOptions(1)) < 1e14
    grown = memory_bytes(text_bundle.path, Contender("ort"), (1, 2), EngineOptions(1))
    assert grown.keys() == {"host"}
    assert 1e5 < grown["host"] < 1e9


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["pytorch", "pytorch-aot"])
def test_the_peak_of_torch_is_that_of_its_own_products(backend: str, precision: Precision) -> None:
    pytest.importorskip("torch")
    assert 1e8 < peak_operations_per_second(Contender(backend, precision), EngineOptions(1)) < 1e14


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "fp8"])
def test_the_products_of_the_peak_are_cast_to_any_precision(precision: Precision, tmp_path: Path) -> None:
    _, fidelity = prepare(_products(tmp_path / "products.onnx", 64), precision, tmp_path)
    assert fidelity is not None


def test_a_peak_that_cannot_be_measured_is_said_to_be_missing(
    text_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> float:
        raise EngineError("the device has no memory for products")

    monkeypatch.setattr("engines.bench_command.peak_operations_per_second", fails)
    options = ("--steps", 1, "--batch-sizes", "1", "--rounds", 1, "--threads", 1, "--no-memory")
    assert "No peak of ort was measured: the device has no memory" in call(text_bundle.path, *options).output
    document = strict_json(call(text_bundle.path, *options, "--json").output)
    assert document["without_peak"] == {"ort": "the device has no memory for products"}


def test_a_peak_that_needs_a_package_says_what_to_install(text_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    result = call(text_bundle.path, "--steps", 1, "--batch-sizes", "1", "--rounds", 1, "--threads", 1, "--no-memory")
    assert result.exit_code == 0, result.output
    assert "No peak of ort was measured: that needs the package onnx (" in result.output
    assert "): pip install onnx" in result.output


def test_images_below_the_floor_are_named(text_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--steps", 2, "--batch-sizes", "1", "--rounds", 1, "--threads", 1, "--no-memory")
    said = "Whole images below 30 dB, the floor of a graph: fake at "
    result = call(text_bundle.path, "--backend", "ort,fake", *options)
    assert result.exit_code == 0, result.output
    assert said in result.output
    monkeypatch.setattr("engines.bench_command.FLOOR_DB", 1)
    assert "Whole images below" not in call(text_bundle.path, "--backend", "ort,fake", *options).output


def test_a_device_without_memory_for_the_peak_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from engines.backends import pytorch

    def none_left(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 MiB")

    monkeypatch.setattr(pytorch, "send", none_left)
    with pytest.raises(DeviceMemoryError, match="out of memory"):
        peak_operations_per_second(Contender("pytorch"), EngineOptions(1))


def test_the_command_prints_tables(text_bundle: Bundle) -> None:
    options = ("--steps", 2, "--batch-sizes", "1,2", "--rounds", 1, "--threads", 1, "--no-memory")
    result = call(text_bundle.path, "--backend", "ort,fake,ort", *options)
    assert result.exit_code == 0, result.output
    assert result.output.count("| `ort` |") == 2
    assert result.output.count("| `fake` |") == 3
    assert "1 CPU thread." in result.output
    assert "Prompts were encoded before" in result.output
    document = strict_json(call(text_bundle.path, *options, "--json").output)
    assert [parity["image_psnr_db"] for parity in document["parities"]] == [None]
    assert [speed["batch"] for speed in document["speeds"]] == [1, 2]
    assert document["reference"] == {"backend": "ort", "precision": "fp32"}
    for speed in document["speeds"]:
        assert speed["images_per_second"] == speed["batch"] / speed["seconds"]
        share = speed["operations"] / speed["seconds"] / document["peaks"]["ort"]
        assert speed["share_of_peak"] == pytest.approx(share)
    assert document["peaks"]["ort"] > 1e8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--backend", "x"), "'x' is not one of trt"),
        (("--backend", "ort:fp64"), "'fp64' is not one of fp32"),
        (("--backend", "ort:fp16"), "ort:fp16: ONNX Runtime computes in fp32 on a CPU"),
        (("--batch-sizes", "0"), "not a list of batch sizes"),
        (("--batch-sizes", "65537"), "a batch of 65537 is too large: at most 65536"),
        (("--threads", "3000000000"), "not in the range 0<=x<=1024"),
        (("--backend", "ort,fake", "--plans", "plans"), "none of these keeps plans; trt, "),
        (("--steps", "3"), "no student of 3 steps"),
        (("--prompt", "zebra", "--no-memory"), "Invalid value for --prompt: the text encoder knows none of the words"),
        (("--prompt", "cat " * 9, "--no-memory"), "Invalid value for --prompt"),
    ],
)
def test_what_cannot_be_is_refused(text_bundle: Bundle, arguments: tuple[str, ...], message: str) -> None:
    result = call(text_bundle.path, *arguments)
    assert result.exit_code in (1, 2)
    assert message in result.output


def test_a_backend_that_does_not_open_leaves_none_open(text_bundle: Bundle) -> None:
    contenders = [Contender("ort-tensorrt"), Contender("ort")]
    with pytest.raises(EngineError, match=r"^ort-tensorrt: "):
        Bench(text_bundle, contenders, (1,), EngineOptions(1))
    running = Bench(text_bundle, contenders, (1,), EngineOptions(1), skip=True)
    assert list(running.pipelines) == [Contender("ort")]
    assert list(running.left_out) == [Contender("ort-tensorrt")]
    running.close()
    with pytest.raises(EngineError, match=r"^ort-tensorrt: "):
        Bench(text_bundle, contenders[:1], (1,), EngineOptions(1), skip=True)


@pytest.mark.parametrize("failing", ["step-4.onnx", "decode.onnx"])
def test_a_backend_that_fails_while_it_runs_is_named_or_left_out(
    text_bundle: Bundle, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its second batch size, when there are results of the first."""
    run = FakeEngine.run

    def fail(engine: FakeEngine, inputs: Mapping[str, Array]) -> dict[str, Array]:
        outputs = run(engine, inputs)
        if engine._name == failing and len(next(iter(outputs.values()))) == 2:
            raise EngineError("the device has no memory")
        return outputs

    monkeypatch.setattr(FakeEngine, "run", fail)
    contenders = [Contender("fake"), Contender("ort")]
    running = Bench(text_bundle, contenders, (1, 2), EngineOptions(1))
    with pytest.raises(EngineError, match=r"^fake: the device has no memory"):
        running.speeds(4, 1)
    running.close()
    running = Bench(text_bundle, contenders, (1, 2), EngineOptions(1), skip=True)
    assert {(str(speed.contender), speed.batch) for speed in running.speeds(4, 1)} == {("ort", 1), ("ort", 2)}
    assert [parity.contender for parity in running.parities(4)] == [Contender("ort")]
    assert running.left_out == {Contender("fake"): "fake: the device has no memory"}
    running.close()


@pytest.mark.parametrize("skip", [(), ("--skip",)])
def test_a_process_that_is_killed_while_it_is_measured_is_named(
    text_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, skip: tuple[str, ...]
) -> None:
    class Killed:
        def __init__(self, *_: Any) -> None: ...
        def __enter__(self) -> Killed:
            return self

        def __exit__(self, *_: object) -> None: ...
        def submit(self, *_: Any) -> Any:
            raise BrokenProcessPool("A process in the process pool was terminated abruptly")

    monkeypatch.setattr(benching, "ProcessPoolExecutor", Killed)
    result = call(text_bundle.path, "--backend", "fake", "--batch-sizes", 1, "--rounds", 1, "--threads", 1, *skip)
    assert result.exit_code == (0 if skip else 1)
    said = "Left out: " if skip else "Error: "
    assert f"{said}fake: the process that measured its memory was killed" in result.output
    assert ("| `fake` | 1 |" in result.output) == bool(skip)


def test_what_a_backend_compiles_is_waited_for(text_bundle: Bundle, slow: Contender) -> None:
    running = Bench(text_bundle, [Contender("ort"), slow], (1,), EngineOptions(1))
    running.speeds(1, 1)
    assert {"text.onnx", "step-1.onnx", "decode.onnx"} == set(Built.asked)
    same, other = running.parities(1)
    assert same.step_maximum == 0
    assert other.step_maximum > 0
    running.close()
    Built.asked.clear()
    peak_operations_per_second(slow, EngineOptions(1))
    assert set(Built.asked) == {"products.onnx"}


def test_what_cannot_be_compiled_is_left_out_and_not_timed_on_its_stand_in(
    text_bundle: Bundle, slow: Contender
) -> None:
    contenders = [Contender("ort"), Contender("trt", "fp16")]
    with pytest.raises(EngineError, match=r"^trt:fp16: .*\.onnx could not be built: it cannot be compiled"):
        Bench(text_bundle, contenders, (1,), EngineOptions(1))
    running = Bench(text_bundle, contenders, (1,), EngineOptions(1), skip=True)
    assert list(running.pipelines) == contenders[:1]
    running.close()


def test_images_are_of_the_prompts_that_it_is_told(bundle: Bundle) -> None:
    told = ("one", "three") if bundle.manifest.classes else ("the moon", "a cat")
    running = Bench(bundle, [Contender("fake")], (3,), EngineOptions(1), prompts=told)
    assert [task.condition for task in running._tasks(1, 3)] == [told[0], told[1], told[0]]
    running.close()
