"""The TensorRT backend on a made-up device: memory in the host's, plans that ONNX Runtime runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engines import backends
from engines.backends import open_engine, open_engines, trt
from engines.backends.base import (
    DeviceLostError,
    DeviceMemoryError,
    Engine,
    EngineError,
    EngineOptions,
    GraphSpec,
)
from engines.backends.cuda import Captured
from engines.backends.standin import StandIn
from engines.backends.trt import TrtEngine
from engines.backends.trt_library import Library, build_plan
from engines.bundle import Bundle
from engines.fidelity import asked_of
from engines.pipeline import Generate, Pipeline
from engines.plans import PlanCache, PlanError, PlanKey, Profile
from tests.engines.made_up_trt import MADE_UP, MadeUpContext, MadeUpCuda, build_nothing
from tests.engines.test_backends import HostEngine
from tests.engines.test_engine_contract import graph_of, random_inputs

PROFILE = Profile((1, 4))


@pytest.fixture
def cuda() -> MadeUpCuda:
    return MadeUpCuda()


def opened(graph: GraphSpec, cuda: MadeUpCuda, profile: Profile = PROFILE) -> TrtEngine:
    return TrtEngine(graph, graph.path.read_bytes(), Library(MADE_UP), cuda, profile)  # type: ignore[arg-type]


@pytest.fixture(params=[False, True], ids=["fixed", "dynamic"])
def engine(request: pytest.FixtureRequest, text_bundle: Bundle, cuda: MadeUpCuda) -> Iterator[TrtEngine]:
    with opened(graph_of(text_bundle, "step"), cuda, Profile((1, 4), request.param)) as made:
        yield made


def no_gpu(logger: Any) -> None:
    """What TensorRT's bindings do where its library gives them nothing."""
    raise TypeError("pybind11::init(): factory function returned nullptr")


def test_a_library_that_does_not_start_is_an_error_of_one_line(text_bundle: Bundle, cuda: MadeUpCuda) -> None:
    library = Library(SimpleNamespace(**vars(MADE_UP) | {"Runtime": no_gpu, "Builder": no_gpu}))
    graph = graph_of(text_bundle, "step")
    with pytest.raises(EngineError, match=r"tensorrt-rtx 1\.0 does not start: is there a GPU"):
        build_plan(library, graph.path, graph.inputs, PROFILE)
    with pytest.raises(EngineError, match="does not start"):
        TrtEngine(graph, b"", library, cuda, PROFILE)  # type: ignore[arg-type]


@pytest.fixture
def reference(text_bundle: Bundle) -> Iterator[Engine]:
    with open_engine("ort", graph_of(text_bundle, "step")) as made:
        yield made


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_it_gives_what_onnx_runtime_gives(engine: TrtEngine, reference: Engine, batch: int) -> None:
    for seed in range(3):
        inputs = random_inputs(engine, batch, seed)
        np.testing.assert_allclose(engine.run(inputs)["z_next"], reference.run(inputs)["z_next"], atol=1e-5)


def test_a_batch_beyond_the_largest_is_refused(engine: TrtEngine) -> None:
    with pytest.raises(EngineError, match="batch of 5 is larger than the plan's largest, 4"):
        engine.run(random_inputs(engine, 5))


@pytest.mark.parametrize(
    "change", [{"name": "w"}, {"shape": ("batch", 4, 8, 9)}, {"shape": ("batch",)}, {"dtype": "int64"}]
)
def test_a_plan_of_another_graph_does_not_load(text_bundle: Bundle, cuda: MadeUpCuda, change: dict[str, Any]) -> None:
    graph = graph_of(text_bundle, "step")
    other = graph.outputs[0].model_copy(update=change)
    with pytest.raises(EngineError, match=r"its plan has .*; the manifest wants"):
        TrtEngine(replace(graph, outputs=(other,)), graph.path.read_bytes(), Library(MADE_UP), cuda, PROFILE)  # type: ignore[arg-type]


def test_launches_of_fixed_shapes_are_captured_once_a_shape(text_bundle: Bundle, cuda: MadeUpCuda) -> None:
    with opened(graph_of(text_bundle, "step"), cuda) as engine:
        engine.warmup((1, 4))
        engine.run(random_inputs(engine, 3))
        assert cuda.captured == 2


def test_launches_that_cannot_be_captured_go_one_by_one(
    text_bundle: Bundle, cuda: MadeUpCuda, reference: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(launch: Callable[[], None]) -> Captured:
        raise EngineError("CUDA: cudaStreamEndCapture failed with cudaErrorStreamCaptureInvalidated")

    monkeypatch.setattr(cuda, "capture", fail)
    with opened(graph_of(text_bundle, "step"), cuda) as engine:
        for _ in range(2):
            inputs = random_inputs(engine, 3)
            np.testing.assert_allclose(engine.run(inputs)["z_next"], reference.run(inputs)["z_next"], atol=1e-5)


def test_a_device_that_is_lost_in_a_capture_is_an_error(
    text_bundle: Bundle, cuda: MadeUpCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(launch: Callable[[], None]) -> Captured:
        raise DeviceLostError("CUDA: cudaStreamBeginCapture failed with cudaErrorIllegalAddress")

    monkeypatch.setattr(cuda, "capture", fail)
    with opened(graph_of(text_bundle, "step"), cuda) as engine, pytest.raises(DeviceLostError):
        engine.run(random_inputs(engine, 1))


def test_memory_is_given_back(text_bundle: Bundle, cuda: MadeUpCuda) -> None:
    with opened(graph_of(text_bundle, "step"), cuda) as engine:
        engine.warmup((1, 4))
        assert cuda.memory
        assert cuda.open == 3
    assert not cuda.memory
    assert cuda.open == 0
    with pytest.raises(EngineError, match="closed"):
        engine.run(random_inputs(engine, 1))


def test_what_cannot_be_given_back_keeps_nothing_else(
    text_bundle: Bundle, cuda: MadeUpCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = opened(graph_of(text_bundle, "step"), cuda)
    engine.warmup((1, 4))
    stuck, free = next(iter(cuda.memory)), cuda.free

    def fail(pointer: int) -> None:
        if pointer == stuck:
            raise EngineError("CUDA: cudaFree failed")
        free(pointer)

    monkeypatch.setattr(cuda, "free", fail)
    with pytest.raises(EngineError, match="cudaFree failed"):
        engine.close()
    assert (cuda.open, list(cuda.memory)) == (0, [stuck])
    with pytest.raises(EngineError, match="closed"):
        engine.run(random_inputs(engine, 1))


def test_a_device_without_memory_says_so_and_loses_nothing(text_bundle: Bundle, cuda: MadeUpCuda) -> None:
    with opened(graph_of(text_bundle, "step"), cuda) as engine:
        engine.warmup((1,))
        before = len(cuda.memory)
        cuda.limit = 1000
        with pytest.raises(DeviceMemoryError, match="cudaErrorMemoryAllocation"):
            engine.run(random_inputs(engine, 4))
        assert len(cuda.memory) == before
        engine.run(random_inputs(engine, 1))


def unlucky(monkeypatch: pytest.MonkeyPatch, name: str, times: int) -> None:
    """The library's own call fails so often, says why to its logger, and goes well again."""
    left, plain = [False] * times, getattr(MadeUpContext, name)

    def call(context: MadeUpContext, *given: Any) -> Any:
        if left:
            context.logger.log(1, "[defaultAllocator.cpp] OutOfMemory (Requested size was 1 GiB)")
            return left.pop()
        return plain(context, *given)

    monkeypatch.setattr(MadeUpContext, name, call)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ("set_optimization_profile_async", r"there is no room for a batch of 4 \(.*OutOfMemory"),
        ("set_tensor_address", r"the plan takes no address for z \(.*OutOfMemory"),
        ("set_input_shape", r"the plan does not take z at a batch of 4 \(.*OutOfMemory"),
        ("execute_async_v3", r"TensorRT could not launch it \(.*OutOfMemory"),
    ],
)
def test_memory_that_the_library_does_not_get_is_said_so_and_asked_for_again(
    text_bundle: Bundle, cuda: MadeUpCuda, monkeypatch: pytest.MonkeyPatch, call: str, says: str
) -> None:
    with opened(graph_of(text_bundle, "step"), cuda) as engine:
        engine.warmup((1,))
        before = len(cuda.memory)
        unlucky(monkeypatch, call, times=1)
        with pytest.raises(DeviceMemoryError, match=says):
            engine.run(random_inputs(engine, 4))
        assert len(cuda.memory) == before
        engine.run(random_inputs(engine, 4))


def test_launches_that_the_library_would_not_have_captured_go_one_by_one(
    text_bundle: Bundle, cuda: MadeUpCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MadeUpContext, "is_stream_capturable", lambda context, stream: False)
    with opened(graph_of(text_bundle, "step"), cuda) as engine:
        engine.warmup((1, 4))
        assert cuda.captured == 0


def test_what_lies_on_the_device_is_not_sent_again(text_bundle: Bundle, cuda: MadeUpCuda) -> None:
    graphs = text_bundle.graphs()
    engines: dict[str, Engine] = {name: opened(graph, cuda) for name, graph in graphs.items()}
    tasks = [Generate("a red cat", 4, 1.0, seed) for seed in (1, 2)]
    with Pipeline(text_bundle, engines, PROFILE.batch_sizes) as pipeline:
        rows = pipeline.prepare(tasks)
        sent = []
        for _ in range(4):
            before = cuda.uploads
            pipeline.tick(rows)
            sent.append(cuda.uploads - before)
        images = pipeline.finish(rows)
    assert sent == [11, 6, 6, 6]  # then only the place on the grid
    with Pipeline.open(text_bundle.path) as plain:
        for image, expected in zip(images, plain.run(tasks), strict=True):
            np.testing.assert_allclose(image.astype(int), expected.astype(int), atol=1)


def test_a_plan_that_does_not_load_is_an_error(text_bundle: Bundle, cuda: MadeUpCuda) -> None:
    with pytest.raises(EngineError, match=r"cannot load its plan .the plan was built by version 9"):
        TrtEngine(graph_of(text_bundle, "step"), b"of another version", Library(MADE_UP), cuda, PROFILE)  # type: ignore[arg-type]


def test_a_plan_of_another_graph_is_an_error(text_bundle: Bundle, cuda: MadeUpCuda) -> None:
    step, decode = (graph_of(text_bundle, role) for role in ("step", "decode"))
    with pytest.raises(EngineError, match=r"its plan has .*latent.*; the manifest wants"):
        TrtEngine(step, decode.path.read_bytes(), Library(MADE_UP), cuda, PROFILE)  # type: ignore[arg-type]


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch, cuda: MadeUpCuda, tmp_path: Path) -> EngineOptions:
    """A machine with a made-up TensorRT, and a folder of plans."""
    monkeypatch.setattr(trt, "find_library", lambda: Library(MADE_UP))
    monkeypatch.setattr(trt, "Cuda", lambda: cuda)
    monkeypatch.setattr(trt, "build_plan", build_nothing)
    return EngineOptions(profile=PROFILE, plans=tmp_path)


def test_onnx_runtime_answers_until_the_plan_is_there(text_bundle: Bundle, made_up: EngineOptions) -> None:
    graph = graph_of(text_bundle, "step")
    with open_engine("trt", graph, made_up) as engine:
        assert isinstance(engine, StandIn)
        inputs = random_inputs(engine, 2)
        assert engine.state in ("building", "built")
        first = engine.run(inputs)["z_next"]
        assert engine.wait(60)
        assert engine.state == "built"
        assert isinstance(engine.current, TrtEngine)
        np.testing.assert_allclose(engine.run(inputs)["z_next"], first, atol=1e-5)
    with open_engine("trt", graph, made_up) as engine:
        assert isinstance(engine, TrtEngine)


def test_a_damaged_plan_is_built_anew(text_bundle: Bundle, made_up: EngineOptions) -> None:
    graph = graph_of(text_bundle, "step")
    key = PlanKey(graph.sha256, asked_of(graph), Library(MADE_UP).name, "sm89", "fp32", PROFILE)
    path = PlanCache(made_up.plans).save(key, b"a plan")
    path.write_bytes(b"a pl")
    with open_engine("trt", graph, made_up) as engine:
        assert isinstance(engine, StandIn)
        assert engine.wait(60)
        assert engine.failure is None
    assert len(PlanCache(made_up.plans).load(key) or b"") > 10


def test_a_plan_that_does_not_load_is_built_anew(
    text_bundle: Bundle, made_up: EngineOptions, caplog: pytest.LogCaptureFixture
) -> None:
    graph = graph_of(text_bundle, "step")
    key = PlanKey(graph.sha256, asked_of(graph), Library(MADE_UP).name, "sm89", "fp32", PROFILE)
    cache = PlanCache(made_up.plans)
    cache.save(key, b"of another version")
    with open_engine("trt", graph, made_up) as engine:
        assert isinstance(engine, StandIn)
        assert engine.wait(60)
        assert isinstance(engine.current, TrtEngine)
    assert "does not load or run as it should, and is built anew" in caplog.text
    assert "built by version 9" in caplog.text
    assert cache.load(key) != b"of another version"


def test_a_chip_that_the_library_does_not_compile_for_is_left_to_other_backends(
    text_bundle: Bundle, made_up: EngineOptions, cuda: MadeUpCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "target", "sm70")
    monkeypatch.setattr(backends, "BEST_FIRST", ("trt", "ort"))
    opened = open_engines("auto", text_bundle.graphs(), made_up)
    assert opened.backend == "ort"
    assert opened.passed_over == {"trt": "tensorrt-rtx 1.0 does not compile for 'sm70'; it does for sm89, sm120"}
    with pytest.raises(EngineError, match="does not compile for 'sm70'"):
        open_engine("trt", graph_of(text_bundle, "step"), made_up)


def test_the_stand_in_is_on_the_device_where_onnx_runtime_is(
    text_bundle: Bundle, made_up: EngineOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt, "OrtCudaEngine", HostEngine)
    go_on = Event()
    build = trt.build_plan
    monkeypatch.setattr(trt, "build_plan", lambda *given: go_on.wait(60) and build(*given))
    with open_engine("trt", graph_of(text_bundle, "step"), made_up) as engine:
        assert isinstance(engine, StandIn)
        assert isinstance(engine.current, HostEngine)
        go_on.set()
        assert engine.wait(60)
        assert isinstance(engine.current, TrtEngine)


def test_a_plan_that_cannot_be_built_leaves_the_stand_in(
    text_bundle: Bundle, made_up: EngineOptions, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> bytes:
        raise EngineError("it cannot be built")

    monkeypatch.setattr(trt, "build_plan", fail)
    with open_engine("trt", graph_of(text_bundle, "step"), made_up) as engine:
        assert isinstance(engine, StandIn)
        assert engine.wait(60)
        assert (engine.state, str(engine.failure)) == ("failed", "it cannot be built")
        engine.run(random_inputs(engine, 2))
    assert "stays on its stand-in: it cannot be built" in caplog.text


def test_a_build_ends_when_its_engine_is_closed(
    text_bundle: Bundle, made_up: EngineOptions, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    begun, go_on = Event(), Event()

    def build(*given: Any) -> bytes:
        begun.set()
        assert go_on.wait(60)
        return build_nothing(*given)

    monkeypatch.setattr(trt, "build_plan", build)
    with open_engine("trt", graph_of(text_bundle, "step"), made_up) as engine:
        assert isinstance(engine, StandIn)
        assert begun.wait(60)
    go_on.set()
    assert engine.wait(60)
    assert str(engine.failure) == "the build was ended"
    assert "stays on its stand-in" not in caplog.text


def test_nothing_is_built_of_a_graph_that_was_replaced(
    text_bundle: Bundle, made_up: EngineOptions, tmp_path: Path
) -> None:
    """Another revision in its place: its plan under the key of the older one would be found by that."""
    graph = graph_of(text_bundle, "step")
    copy = tmp_path / graph.path.name
    copy.write_bytes(graph.path.read_bytes())
    opened_as = replace(graph, path=copy, files=((copy, "0" * 64),))
    with open_engine("trt", opened_as, made_up) as engine:
        assert isinstance(engine, StandIn)
        assert engine.wait(60)
        assert "replaced after the bundle was opened" in str(engine.failure)
    assert not list(tmp_path.glob("*.plan"))


def test_a_plan_that_does_not_run_is_built_anew(
    text_bundle: Bundle, made_up: EngineOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = graph_of(text_bundle, "step")
    key = PlanKey(graph.sha256, asked_of(graph), Library(MADE_UP).name, "sm89", "fp32", PROFILE)
    PlanCache(made_up.plans).save(key, graph.path.read_bytes())
    execute, failures = MadeUpContext.execute_async_v3, [False]
    monkeypatch.setattr(
        MadeUpContext, "execute_async_v3", lambda *given: failures.pop() if failures else execute(*given)
    )
    with open_engine("trt", graph, made_up) as engine:
        assert isinstance(engine, StandIn)
        assert engine.wait(60)
        assert isinstance(engine.current, TrtEngine)


def other_graph(text_bundle: Bundle) -> bytes:
    """The plan of another student: what it takes and gives has the names and shapes of this one's."""
    step, other, *_ = (graph for name, graph in text_bundle.graphs().items() if name.startswith("step"))
    assert step.inputs == other.inputs
    return other.path.read_bytes()


def test_a_plan_that_gives_something_else_never_takes_over(
    text_bundle: Bundle, made_up: EngineOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt, "build_plan", lambda *_: other_graph(text_bundle))
    with open_engine("trt", graph_of(text_bundle, "step"), made_up) as engine:
        assert isinstance(engine, StandIn)
        assert engine.wait(60)
        assert "dB to fp32, below 30 dB" in str(engine.failure)
        assert not isinstance(engine.current, TrtEngine)
    assert made_up.plans is not None
    assert not list(made_up.plans.glob("*.plan"))


@pytest.mark.parametrize("largest", [1, 4])
@pytest.mark.parametrize("right", [True, False])
def test_a_plan_that_was_built_ahead_is_checked_once(
    text_bundle: Bundle, made_up: EngineOptions, right: bool, largest: int
) -> None:
    graph, options = graph_of(text_bundle, "step"), replace(made_up, profile=Profile((1, largest)))
    key = PlanKey(graph.sha256, asked_of(graph), Library(MADE_UP).name, "sm89", "fp32", options.profile)
    ahead = graph.path.read_bytes() if right else other_graph(text_bundle)
    PlanCache(made_up.plans).save(key, ahead)
    with open_engine("trt", graph, options) as engine:
        assert isinstance(engine, TrtEngine if right else StandIn)
        if isinstance(engine, StandIn):
            assert engine.wait(60)
            assert isinstance(engine.current, TrtEngine)
    assert (PlanCache(made_up.plans).load(key) == ahead) == right
    with open_engine("trt", graph, options) as engine:
        assert isinstance(engine, TrtEngine)


def ahead_of(graph: GraphSpec, options: EngineOptions) -> None:
    """Have the plan of a graph in the folder, as it was built elsewhere."""
    key = PlanKey(graph.sha256, asked_of(graph), Library(MADE_UP).name, "sm89", "fp32", options.profile)
    PlanCache(options.plans).save(key, graph.path.read_bytes())


def test_a_plan_that_cannot_be_marked_as_checked_is_told_so(
    text_bundle: Bundle, made_up: EngineOptions, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    graph = graph_of(text_bundle, "step")
    ahead_of(graph, made_up)
    monkeypatch.setattr("engines.plans.write_whole", refuse)
    with open_engine("trt", graph, made_up) as engine:
        assert isinstance(engine, TrtEngine)
    (record,) = (record for record in caplog.records if record.levelname == "WARNING")
    assert "cannot be marked as checked, and is checked at every start" in record.getMessage()


def test_a_plan_that_was_built_ahead_is_checked_with_the_device_for_itself(
    text_bundle: Bundle, made_up: EngineOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = graph_of(text_bundle, "step")
    monkeypatch.setattr(trt, "OrtCudaEngine", lambda *_: pytest.fail("it needs the device's memory"))
    ahead_of(graph, made_up)
    with open_engine("trt", graph, made_up) as engine:
        assert isinstance(engine, TrtEngine)


def test_a_plan_that_finds_no_memory_is_built_anew_while_the_device_answers(
    text_bundle: Bundle, made_up: EngineOptions, monkeypatch: pytest.MonkeyPatch, cuda: MadeUpCuda
) -> None:
    graph = graph_of(text_bundle, "step")

    class Late(HostEngine):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            cuda.limit = 1 << 40  # others have given some back

    monkeypatch.setattr(trt, "OrtCudaEngine", Late)
    ahead_of(graph, made_up)
    cuda.limit = 1000
    with open_engine("trt", graph, made_up) as engine:
        assert isinstance(engine, StandIn)
        assert engine.wait(60)
        assert isinstance(engine.current, TrtEngine)


def test_a_plan_that_cannot_be_kept_is_used_all_the_same(text_bundle: Bundle, made_up: EngineOptions) -> None:
    assert made_up.plans is not None
    plans = made_up.plans / "plans"
    plans.write_text("a file where the folder should be")
    with open_engine("trt", graph_of(text_bundle, "step"), replace(made_up, plans=plans)) as engine:
        assert isinstance(engine, StandIn)
        assert engine.wait(60)
        assert isinstance(engine.current, TrtEngine)


@pytest.mark.parametrize("built", [Profile((1, 2, 4, 8)), Profile((4,), dynamic=True)])
def test_a_plan_of_a_wider_profile_is_used_with_that_profile(
    text_bundle: Bundle, made_up: EngineOptions, reference: Engine, built: Profile
) -> None:
    graph = graph_of(text_bundle, "step")
    key = PlanKey(graph.sha256, asked_of(graph), Library(MADE_UP).name, "sm89", "fp32", built)
    PlanCache(made_up.plans).keep(key, graph.path.read_bytes())
    with open_engine("trt", graph, made_up) as engine:
        assert isinstance(engine, TrtEngine)
        for batch in (1, 3):
            inputs = random_inputs(engine, batch)
            np.testing.assert_allclose(engine.run(inputs)["z_next"], reference.run(inputs)["z_next"], atol=1e-5)


def test_an_engine_that_does_not_get_warm_gives_all_back(
    text_bundle: Bundle, made_up: EngineOptions, cuda: MadeUpCuda
) -> None:
    cuda.limit = 1000
    with open_engine("trt", graph_of(text_bundle, "step"), made_up) as engine:
        assert isinstance(engine, StandIn)
        assert engine.wait(60)
        assert isinstance(engine.failure, DeviceMemoryError)
    assert (cuda.open, cuda.memory) == (0, {})


def test_without_a_folder_for_plans_the_backend_does_not_open(
    text_bundle: Bundle, made_up: EngineOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> Path:
        raise PlanError("there is no folder to keep plans in")

    monkeypatch.setattr("engines.plans.plans_folder", none)
    with pytest.raises(EngineError, match="backend 'trt': there is no folder"):
        open_engine("trt", graph_of(text_bundle, "step"), replace(made_up, plans=None))
