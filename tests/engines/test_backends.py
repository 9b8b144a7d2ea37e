"""Which backend opens a bundle, and what is kept between ticks."""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import onnxruntime as ort
import pytest

from engines import backends
from engines.backends import BACKENDS, BEST_FIRST, open_engine, open_engines, trt_library
from engines.backends.base import Array, DeviceMemoryError, Engine, EngineError, EngineOptions, GraphSpec
from engines.backends.fake import FakeEngine
from engines.backends.ort import OrtCudaEngine, OrtEngine, OrtTensorrtEngine
from engines.backends.ort_session import CPU
from engines.backends.resident import Resident
from engines.backends.trt_library import Library
from engines.bundle import Bundle
from engines.pipeline import Generate, Inpaint, Pipeline
from engines.rows import TickInputs, step_inputs
from tests.engines.test_engine_contract import graph_of, random_inputs


class HostEngine(OrtCudaEngine):
    """The engine for devices, on the one that is always there."""

    provider, device = CPU, "cpu"

    def _providers(self, options: EngineOptions) -> list[Any]:
        return []


class HostTensorrtEngine(OrtTensorrtEngine):
    """The engine that keeps plans, on the device that is always there."""

    provider, device = CPU, "cpu"


def frozen(*values: float) -> np.ndarray:
    array = np.array(values)
    array.flags.writeable = False
    return array


def test_auto_takes_the_best_that_opens_and_says_why_not_the_others(
    text_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "BEST_FIRST", ("trt", "ort-cuda", "fake", "ort"))
    monkeypatch.setattr("engines.backends.trt_library.MODULES", ("absent_library",))
    opened = open_engines("auto", text_bundle.graphs())
    assert opened.backend == "fake"
    assert list(opened.passed_over) == ["trt", "ort-cuda"]
    assert "pip install 'fewstep[tensorrt]'" in opened.passed_over["trt"]
    assert "CUDAExecutionProvider" in opened.passed_over["ort-cuda"]
    with Pipeline.open(text_bundle.path, backend="auto") as pipeline:
        assert (pipeline.backend, list(pipeline.passed_over)) == ("fake", ["trt", "ort-cuda"])


def test_auto_without_any_that_opens_says_all_reasons(text_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "BEST_FIRST", ("ort-cuda",))
    with pytest.raises(EngineError, match="no backend runs the bundle; ort-cuda: this ONNX Runtime has no"):
        open_engines("auto", text_bundle.graphs())


def test_a_build_for_cpus_that_lies_over_that_for_gpus_is_said_to(
    text_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.backends.ort.version", {"onnxruntime-gpu": "1.31.1"}.__getitem__)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(EngineError, match="lies over that for GPUs: pip uninstall -y onnxruntime, then pip install"):
        open_engines("ort-cuda", text_bundle.graphs())


def test_auto_tries_every_backend_and_a_cpu_keeps_onnx_runtime(text_bundle: Bundle) -> None:
    assert set(BEST_FIRST) == BACKENDS.keys() - {"fake"}
    if len(ort.get_available_providers()) > 2:
        pytest.skip("this ONNX Runtime has providers for devices")
    opened = open_engines("auto", text_bundle.graphs())
    assert opened.backend == "ort"
    assert list(opened.passed_over) == ["trt", "pytorch-cuda", "ort-cuda", "ort-tensorrt"]
    with pytest.raises(EngineError, match=r"ort: ONNX Runtime computes in fp32 .*; pytorch-aot: .* no program of"):
        open_engines("auto", text_bundle.graphs(), EngineOptions(precision="bf16"))


def open_anyhow(graph: GraphSpec, options: EngineOptions) -> Engine:
    return FakeEngine(graph, EngineOptions())


def open_nothing(graph: GraphSpec, options: EngineOptions) -> Engine:
    raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")


def test_whatever_fails_while_a_backend_opens_is_passed_over(
    text_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKENDS, "full", "tests.engines.test_backends:open_nothing")
    monkeypatch.setattr(backends, "BEST_FIRST", ("full", "fake"))
    with pytest.raises(DeviceMemoryError, match=r"backend 'full': .*\.onnx: RuntimeError: CUDA out of memory"):
        open_engine("full", graph_of(text_bundle, "step"))
    assert open_engines("auto", text_bundle.graphs()).backend == "fake"


class Unfit(FakeEngine):
    """Opens, and runs nothing, as on a device that its library has no code for."""

    opened: ClassVar[list[Unfit]] = []

    def __init__(self, graph: GraphSpec, options: EngineOptions) -> None:
        super().__init__(graph, options)
        self.opened.append(self)
        self.is_open = True

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        raise EngineError("no kernel image is available for execution on the device")

    def close(self) -> None:
        super().close()
        self.is_open = False


def test_what_opens_but_does_not_run_is_passed_over(text_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "unfit", "tests.engines.test_backends:Unfit")
    monkeypatch.setattr(backends, "BEST_FIRST", ("unfit", "fake"))
    opened = open_engines("auto", text_bundle.graphs())
    assert opened.backend == "fake"
    assert opened.passed_over == {"unfit": "no kernel image is available for execution on the device"}
    assert Unfit.opened
    assert not any(engine.is_open for engine in Unfit.opened)


def test_a_library_that_does_not_load_is_passed_over(text_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Any:
        if name == "engines.backends.trt":
            raise OSError("libcudart.so.12: cannot open shared object file")
        return import_module(name)

    monkeypatch.setattr(backends, "import_module", load)
    monkeypatch.setattr(backends, "BEST_FIRST", ("trt", "fake"))
    opened = open_engines("auto", text_bundle.graphs())
    assert opened.passed_over == {
        "trt": "backend 'trt' cannot be imported: libcudart.so.12: cannot open shared object file"
    }


@pytest.mark.parametrize(
    "error",
    [
        ImportError("libnvinfer.so.10: cannot open shared object file"),
        ModuleNotFoundError("No module named 'tensorrt_libs'", name="tensorrt_libs"),
    ],
)
def test_a_tensorrt_without_its_libraries_is_not_called_absent(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str) -> Any:
        raise error

    monkeypatch.setattr(trt_library, "import_module", load)
    with pytest.raises(EngineError, match=f"tensorrt is installed but its libraries do not load: {error}"):
        trt_library.find_library()


def test_a_library_that_does_not_do_is_passed_over_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Any:
        if name == "tensorrt":
            raise ImportError("libnvinfer.so.10: cannot open shared object file")
        return SimpleNamespace(__name__=name, __version__="1.0")

    def check(library: Library) -> None:
        if not library.is_rtx:
            raise EngineError("no chip to build for was found")

    monkeypatch.setattr(trt_library, "import_module", load)
    assert trt_library.find_library(check).name == "tensorrt-rtx 1.0"
    monkeypatch.setattr(trt_library, "MODULES", ("tensorrt", "plain"))
    with pytest.raises(EngineError, match=r"^tensorrt is installed but .* shared object file; no chip to build for"):
        trt_library.find_library(check)


@pytest.mark.parametrize("backend", ["ort-cuda", "ort-tensorrt"])
def test_a_provider_that_is_missing_is_named(text_bundle: Bundle, backend: str) -> None:
    if len(ort.get_available_providers()) > 2:
        pytest.skip("this ONNX Runtime has providers for devices")
    with pytest.raises(EngineError, match=r"has no (CUDA|Tensorrt)ExecutionProvider, only .*fewstep\[gpu\]"):
        open_engine(backend, graph_of(text_bundle, "step"))


def test_a_folder_for_plans_that_cannot_be_made_is_an_error(
    text_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKENDS, "host", "tests.engines.test_backends:HostTensorrtEngine")
    (tmp_path / "file").touch()
    options = EngineOptions(threads=1, plans=tmp_path / "file" / "plans")
    with pytest.raises(EngineError, match=r"the folder for plans, .*/file/plans, cannot be made: Not a directory"):
        open_engine("host", graph_of(text_bundle, "step"), options)


def test_a_precision_without_the_package_that_casts_is_passed_over(
    text_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKENDS, "host", "tests.engines.test_backends:HostEngine")
    monkeypatch.setitem(BACKENDS, "lower", "tests.engines.test_backends:open_anyhow")
    monkeypatch.setattr(backends, "BEST_FIRST", ("host", "lower"))
    monkeypatch.setitem(sys.modules, "onnx", None)
    options = EngineOptions(threads=1, precision="fp16")
    with pytest.raises(EngineError, match=r"casting a graph to fp16 needs the package onnx .*pip install onnx"):
        open_engine("host", graph_of(text_bundle, "step"), options)
    opened = open_engines("auto", text_bundle.graphs(), options)
    assert opened.backend == "lower"
    assert "pip install onnx" in opened.passed_over["host"]


def test_no_engine_stays_open_when_one_does_not_open(text_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[FakeEngine] = []

    def open_two(graph: Any, options: EngineOptions) -> FakeEngine:
        if len(made) == 2:
            raise EngineError("a third one does not open")
        made.append(FakeEngine(graph, options))
        return made[-1]

    monkeypatch.setattr("engines.backends.fake.FakeEngine", open_two)
    with pytest.raises(EngineError, match="a third one"):
        open_engines("fake", text_bundle.graphs())
    for engine in made:
        with pytest.raises(EngineError, match="closed"):
            engine.warmup((1,))


def test_the_engine_for_devices_gives_what_the_other_gives(bundle: Bundle) -> None:
    for graph in bundle.graphs().values():
        with OrtEngine(graph, EngineOptions(threads=1)) as plain, HostEngine(graph, EngineOptions()) as device:
            for batch in (1, 3):
                inputs = random_inputs(plain, batch)
                for name, array in plain.run(inputs).items():
                    np.testing.assert_allclose(device.run(inputs)[name], array, atol=1e-5)


@pytest.mark.parametrize("company", [1, 3])
def test_images_of_the_engine_for_devices_are_the_same(
    text_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, company: int
) -> None:
    """Rows that move together keep their arrays; those that others join are sent anew."""
    monkeypatch.setitem(BACKENDS, "host", "tests.engines.test_backends:HostEngine")
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    repaint = np.zeros((16, 16), bool)
    repaint[:8] = True
    tasks = [
        Inpaint("a red cat", 4, 1.0, 1, image=image, repaint=repaint),
        Generate("the sun", 4, 2.0, 2),
        Generate("the moon", 4, 0.0, 3),
    ]
    made = []
    for backend in ("ort", "host"):
        with Pipeline.open(text_bundle.path, backend=backend, batch_sizes=(1, 2, 4)) as pipeline:
            rows = pipeline.prepare(tasks)
            pipeline.tick(rows[:company])
            pipeline.tick(rows[:company])
            pipeline.tick(rows)
            while moving := [row for row in rows if not row.done]:
                pipeline.tick(moving)
            made.append(pipeline.finish(rows))
    for ours, theirs in zip(*made, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_rows_that_move_together_keep_their_arrays(text_bundle: Bundle) -> None:
    with Pipeline.open(text_bundle.path, backend="fake") as pipeline:
        rows = pipeline.prepare([Generate("a cat", 4, 1.0, seed) for seed in range(3)])
    ticks, inputs = TickInputs(), step_inputs(rows)
    first = ticks.of(rows)
    for name, array in inputs.items():
        np.testing.assert_array_equal(first[name], array)
    z_next = np.array(first["z"] * 2)
    ticks.move(rows, first, z_next)
    again = ticks.of(rows)
    assert again["z"] is z_next
    assert all(again[name] is first[name] for name in ("known", "keep", "noise", "context"))
    for name, array in step_inputs(rows).items():
        np.testing.assert_array_equal(again[name], array)
    for others in (rows[:2], rows[::-1]):
        assert ticks.of(others)["z"] is not z_next
        for name, array in step_inputs(others).items():
            np.testing.assert_array_equal(ticks.of(others)[name], array)
    with pytest.raises(ValueError, match="read-only"):
        rows[0].z[:] = 0


def test_an_array_that_can_be_written_to_is_sent_each_time() -> None:
    resident, sent = Resident[int](), list[float]()

    def send(array: np.ndarray) -> int:
        sent.append(float(array[0]))
        return len(sent)

    fixed, loose = frozen(1), np.array([2.0])
    assert [resident.get("a", fixed, send) for _ in range(3)] == [1, 1, 1]
    assert [resident.get("b", loose, send) for _ in range(2)] == [2, 3]
    shown = loose.view()
    shown.flags.writeable = False
    assert [resident.get("c", array, send) for array in (shown, shown, fixed[:], fixed[:])] == [4, 5, 6, 7]
    part = fixed[:]
    assert [resident.get("d", part, send) for _ in range(2)] == [8, 8]
    assert resident.get("a", frozen(1), send) == 9
    assert resident.get("a", fixed, send) == 10


def test_an_array_that_is_gone_is_not_mistaken_for_another() -> None:
    resident = Resident[int]()
    for i in range(200):
        array = frozen(i)
        assert resident.get("a", array, lambda array: int(array[0])) == i
        del array
        gc.collect(0)
