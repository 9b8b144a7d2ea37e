"""What only the backends of PyTorch must do: find their program, refuse another, keep what they compile."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="programs need torch")

from engines.backends import exported, open_engine, open_engines, programs, pytorch  # noqa: E402
from engines.backends.base import DeviceMemoryError, EngineError, EngineOptions, GraphSpec, TensorSpec  # noqa: E402
from engines.backends.exported import Tensors, compile_program, load_program, runnable, trace  # noqa: E402
from engines.backends.pytorch import PytorchEngine  # noqa: E402
from engines.backends.standin import StandIn  # noqa: E402
from engines.bundle import Bundle  # noqa: E402
from engines.fidelity import asked_of  # noqa: E402
from engines.hashes import sha256_of  # noqa: E402
from engines.pipeline import Generate, Inpaint, Pipeline  # noqa: E402
from engines.plans import PlanCache, PlanKey, Precision, Profile  # noqa: E402
from tests.engines.test_engine_contract import graph_of, random_inputs  # noqa: E402
from tests.programs import save_program, with_programs  # noqa: E402

ONE = EngineOptions(threads=1)


def spec(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=shape)


IMAGE, LATENT = spec("image", "batch", 3, 8, 8), spec("latent", "batch", 3, 8, 8)


class Halving(torch.nn.Module):
    """The least that can be told from something else."""

    def forward(self, inputs: Tensors) -> Tensors:
        return {"latent": inputs["image"] * 0.5}


class Weighing(torch.nn.Module):
    """What weighs more than its code."""

    def __init__(self, weights: torch.Tensor) -> None:
        super().__init__()
        self.weights = torch.nn.Parameter(weights)

    def forward(self, inputs: Tensors) -> Tensors:
        return {"latent": inputs["image"] * self.weights.mean()}


class Dividing(torch.nn.Module):
    """The same, told otherwise."""

    def forward(self, inputs: Tensors) -> Tensors:
        return {"latent": inputs["image"] / 2}


class Cancelling(torch.nn.Module):
    """The small difference of two large products."""

    def forward(self, inputs: Tensors) -> Tensors:
        large = 1000 * torch.eye(8)
        return {"latent": inputs["image"] @ (large + torch.eye(8)) - inputs["image"] @ large}


class Normalising(torch.nn.Module):
    """A product and a normalisation of it."""

    def forward(self, inputs: Tensors) -> Tensors:
        return {"latent": torch.nn.functional.layer_norm(inputs["image"] @ torch.eye(8), [8])}


def graph_with(module: torch.nn.Module, folder: Path) -> GraphSpec:
    graph = GraphSpec("encode", folder / "encode.onnx", (IMAGE,), (LATENT,))
    program = save_program(module, graph, folder / "encode.pt2")
    return replace(graph, program=program, program_sha256=sha256_of(program))


@pytest.fixture(scope="module")
def programmed(bundles: dict[tuple[str, str], Bundle], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return with_programs(bundles["text", "latent"], tmp_path_factory.mktemp("programmed"))


@pytest.fixture(scope="module")
def halving(tmp_path_factory: pytest.TempPathFactory) -> GraphSpec:
    return graph_with(Halving(), tmp_path_factory.mktemp("halving"))


@pytest.fixture(scope="module")
def package(halving: GraphSpec) -> bytes:
    """Halving, really compiled for this CPU, though traced with images whose channels lie together."""
    program = load_program(halving, "cpu")
    (inputs,), rest = program.example_inputs
    image = inputs["image"].contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        program = torch.export.export(
            runnable(program), ({"image": image},), rest, dynamic_shapes=({"image": {0: torch.export.Dim.DYNAMIC}},)
        )
    assert not program.example_inputs[0][0]["image"].is_contiguous()
    return compile_program(program, ONE, "cpu")


def test_a_program_is_traced_with_arrays_as_they_come() -> None:
    image = torch.zeros(3, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    program = trace(Halving(), {"image": image})
    assert program.example_inputs[0][0]["image"].is_contiguous()


@pytest.mark.parametrize("backend", ["pytorch", "pytorch-aot", "pytorch-cuda"])
def test_a_bundle_without_programs_says_how_to_get_them(text_bundle: Bundle, backend: str) -> None:
    with pytest.raises(
        EngineError, match=r"no program of .*onnx: write it with `fewstep export RECIPE OUT --programs`"
    ):
        open_engine(backend, graph_of(text_bundle, "step"))


@pytest.mark.parametrize("error", [ModuleNotFoundError("No module named 'torch'"), OSError("libcudnn.so.9: not found")])
def test_without_torch_it_says_what_to_install(
    halving: GraphSpec, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def absent(name: str) -> Any:
        raise error

    monkeypatch.setattr(programs, "import_module", absent)
    with pytest.raises(EngineError, match=r"torch cannot be imported .*pip install 'fewstep\[pytorch\]'"):
        open_engine("pytorch", halving)


def test_auto_takes_no_program_to_a_cpu(programmed: Bundle) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    opened = open_engines("auto", programmed.graphs())
    assert opened.backend == "ort"
    assert "finds no CUDA device" in opened.passed_over["pytorch-cuda"]


@pytest.mark.parametrize("content", [b"", b"no program", slice(1000)])
def test_a_file_that_is_no_program_does_not_load(halving: GraphSpec, tmp_path: Path, content: Any) -> None:
    assert halving.program is not None
    damaged = tmp_path / "encode.pt2"
    damaged.write_bytes(halving.program.read_bytes()[content] if isinstance(content, slice) else content)
    with pytest.raises(EngineError, match=r"encode\.pt2: torch cannot load it as a program"):
        open_engine("pytorch", replace(halving, program=damaged))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            {"inputs": (spec("image", "batch", 3, 16, 16),)},
            r"have image .*, 8\) where the manifest wants image .*, 16\)",
        ),
        ({"inputs": (spec("image", 3, 3, 8, 8),)}, r"wants image float32\(3, 3, 8, 8\)"),
        ({"inputs": (IMAGE, spec("mask", "batch"))}, "inputs have nothing where the manifest wants mask"),
        ({"outputs": (spec("latent", "batch", 4, 8, 8),)}, "outputs have latent"),
        ({"outputs": (IMAGE,)}, "outputs have latent .* wants image"),
    ],
)
def test_a_program_of_another_graph_does_not_load(halving: GraphSpec, change: Any, named: str) -> None:
    with pytest.raises(EngineError, match=named):
        open_engine("pytorch", replace(halving, **change))


def test_a_batch_beyond_what_the_program_takes_is_refused(halving: GraphSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exported, "ANY_BATCH", Profile((4,), dynamic=True))
    with open_engine("pytorch", halving, ONE) as engine:
        engine.warmup((1, 4))
        with pytest.raises(EngineError, match="batch of 5 is larger than its program's largest, 4"):
            engine.warmup((5,))


def test_float32_is_convolved_whole_and_the_switch_put_back(halving: GraphSpec) -> None:
    """On a CUDA device cuDNN would keep ten bits of it."""
    before, seen = torch.backends.cudnn.allow_tf32, []
    with PytorchEngine(halving, ONE) as engine:
        run = engine._call
        assert run is not None

        def spy(inputs: Tensors) -> Tensors:
            seen.append(torch.backends.cudnn.allow_tf32)
            return run(inputs)

        engine._call = spy
        engine.warmup((1,))
    assert set(seen) == {False}
    assert torch.backends.cudnn.allow_tf32 == before


def test_one_that_is_done_leaves_the_switch_to_the_one_that_runs() -> None:
    before = torch.backends.cudnn.allow_tf32
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(pytorch._exact)
        second.enter_context(pytorch._exact)
        first.close()
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 == before


def test_threads_of_the_process_are_put_back(halving: GraphSpec) -> None:
    before, seen = torch.get_num_threads(), []
    with PytorchEngine(halving, EngineOptions(threads=before + 1)) as engine:
        run = engine._call
        assert run is not None

        def spy(inputs: Tensors) -> Tensors:
            seen.append(torch.get_num_threads())
            return run(inputs)

        engine._call = spy
        engine.warmup((1,))
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_memory_that_is_not_there_is_told_from_other_errors(halving: GraphSpec, error: Exception) -> None:
    def fail(inputs: Tensors) -> Tensors:
        raise error

    with PytorchEngine(halving, ONE) as engine:
        engine._call = fail
        with pytest.raises(DeviceMemoryError, match=r"encode\.onnx: .*memory"):
            engine.warmup((1,))


def images(pipeline: Pipeline) -> list[np.ndarray]:
    """Rows that start together, part, and meet again."""
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    repaint = np.zeros((16, 16), bool)
    repaint[:8] = True
    inpaint = Inpaint("a red cat", 4, 1.0, 1, image=image, repaint=repaint)
    rows = pipeline.prepare([inpaint, Generate("the sun", 4, 2.0, 2), Generate("the moon", 4, 0.0, 3)])
    for moving in (rows[:2], rows[:2], rows, rows[2:], rows[1:2], rows[2:]):
        pipeline.tick(moving)
    pipeline.tick([row for row in rows if not row.done])
    return [np.asarray(made) for made in pipeline.finish(rows)]


@pytest.mark.parametrize("captured", [False, True])
def test_images_are_those_of_onnx_runtime(programmed: Bundle, monkeypatch: pytest.MonkeyPatch, captured: bool) -> None:
    """With launches as they come, and with fixed places for them, as on a CUDA device."""
    captures: list[Callable[[], Tensors]] = []
    monkeypatch.setattr(pytorch, "captures", lambda device: captured)
    monkeypatch.setattr(pytorch, "capture", lambda launch: captures.append(launch) or launch)
    made = []
    for backend in ("ort", "pytorch"):
        with Pipeline.open(programmed.path, backend=backend, threads=1, batch_sizes=(1, 4)) as pipeline:
            pipeline.warmup()
            made.append(images(pipeline))
    for ours, theirs in zip(*made, strict=True):
        np.testing.assert_allclose(ours.astype(int), theirs.astype(int), atol=1)
    assert len(captures) == (2 * len(programmed.graphs()) if captured else 0)


def test_launches_that_cannot_be_captured_go_on_as_they_come(
    halving: GraphSpec, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(launch: Callable[[], Tensors]) -> Callable[[], Tensors]:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(pytorch, "captures", lambda device: True)
    monkeypatch.setattr(pytorch, "capture", fail)
    with open_engine("pytorch", halving, ONE) as engine:
        inputs = random_inputs(engine, 3)
        for _ in range(3):
            np.testing.assert_array_equal(engine.run(inputs)["latent"], inputs["image"] / 2)
    assert caplog.text.count("not permitted") == 1


@pytest.mark.parametrize("captured", [False, True])
def test_what_lies_on_the_device_is_not_sent_again(
    programmed: Bundle, monkeypatch: pytest.MonkeyPatch, captured: bool
) -> None:
    sent, send = list[int](), pytorch.send
    monkeypatch.setattr(pytorch, "captures", lambda device: captured)
    monkeypatch.setattr(pytorch, "capture", lambda launch: launch)
    monkeypatch.setattr(pytorch, "send", lambda array, device: sent.append(len(array)) or send(array, device))
    with Pipeline.open(programmed.path, backend="pytorch", threads=1, batch_sizes=(1, 4)) as pipeline:
        pipeline.warmup()
        rows = pipeline.prepare([Generate("a cat", 4, 1.0, seed) for seed in (1, 2)])
        sent.clear()
        counts = []
        for _ in range(4):
            pipeline.tick(rows)
            counts.append(len(sent))
            sent.clear()
    assert counts == [11, 6, 6, 6]  # then only the place on the grid


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_lower_precision_stays_near_fp32(programmed: Bundle, precision: Precision) -> None:
    graph = graph_of(programmed, "step")
    with (
        open_engine("pytorch", graph, ONE) as whole,
        open_engine("pytorch", graph, replace(ONE, precision=precision)) as low,
    ):
        inputs = random_inputs(whole, 3)
        difference = np.abs(whole.run(inputs)["z_next"] - low.run(inputs)["z_next"]).max()
    assert 1e-5 < difference < 1e-2


def test_a_program_that_a_precision_ruins_is_refused(tmp_path: Path) -> None:
    graph = graph_with(Cancelling(), tmp_path)
    open_engine("pytorch", graph, ONE).warmup((2,))
    with pytest.raises(EngineError, match=r"encode\.onnx: in bf16 it is at .* dB to fp32, below 30 dB"):
        open_engine("pytorch", graph, replace(ONE, precision="bf16"))


def test_a_package_gives_what_the_program_gives(halving: GraphSpec, package: bytes) -> None:
    with PytorchEngine(halving, ONE) as program, PytorchEngine(halving, ONE, "cpu", package) as compiled:
        for batch in (1, 2, 7):
            inputs = random_inputs(program, batch)
            np.testing.assert_allclose(compiled.run(inputs)["latent"], program.run(inputs)["latent"], atol=1e-6)


def test_weights_are_no_part_of_a_package(tmp_path: Path) -> None:
    """They come from the program: what has them loaded could never be unloaded."""
    weights_bytes = 4 * 3 * 512 * 512
    graph = graph_with(Weighing(torch.randn(3, 512, 512, generator=torch.Generator().manual_seed(0))), tmp_path)
    package = compile_program(load_program(graph, "cpu"), ONE, "cpu")
    assert len(package) < weights_bytes
    with PytorchEngine(graph, ONE) as program, PytorchEngine(graph, ONE, "cpu", package) as compiled:
        inputs = random_inputs(program, 3)
        first = compiled.run(inputs)["latent"]
        np.testing.assert_allclose(first, program.run(inputs)["latent"], rtol=1e-4, atol=1e-4)
    (tmp_path / "other").mkdir()
    other = graph_with(Weighing(torch.zeros(3, 512, 512)), tmp_path / "other")
    with PytorchEngine(other, ONE, "cpu", package) as compiled:
        assert not compiled.run(inputs)["latent"].any()
    with pytest.raises(EngineError, match=r"encode\.onnx: torch cannot load its package"):
        PytorchEngine(graph_with(Halving(), tmp_path), ONE, "cpu", package)


def test_a_package_that_does_not_load_is_an_error(halving: GraphSpec) -> None:
    with pytest.raises(EngineError, match=r"encode\.onnx: torch cannot load its package"):
        PytorchEngine(halving, ONE, "cpu", b"no package")


@pytest.fixture
def compilations(package: bytes, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every compilation, which gives the package at once."""
    done: list[str] = []
    monkeypatch.setattr(pytorch, "compile_program", lambda *_: done.append("compiled") or package)
    return done


def open_twice(graph: GraphSpec, options: EngineOptions) -> None:
    """The first time it may be compiled in the background; the second time it is there."""
    with open_engine("pytorch-aot", graph, options) as engine:
        if isinstance(engine, StandIn):
            engine.warmup((1,))
            assert engine.wait(60)
            assert engine.failure is None
    with open_engine("pytorch-aot", graph, options) as engine:
        assert isinstance(engine, PytorchEngine)
        engine.warmup((2,))


def test_a_package_is_compiled_once(halving: GraphSpec, tmp_path: Path, compilations: list[str]) -> None:
    options = replace(ONE, plans=tmp_path)
    open_twice(halving, options)
    open_twice(halving, replace(options, profile=Profile((1, 32)), threads=2))
    assert len(compilations) == 1


def test_normalisations_are_exact_in_every_precision(tmp_path: Path) -> None:
    with open_engine("pytorch", graph_with(Normalising(), tmp_path), replace(ONE, precision="bf16")) as engine:
        image = np.random.default_rng(0).standard_normal((2, *IMAGE.shape[1:])).astype(np.float32)
        found = torch.tensor(engine.run({"image": image})["latent"])
        expected = torch.nn.functional.layer_norm(torch.from_numpy(image).bfloat16().float(), [8])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_nothing_is_compiled_of_a_program_that_was_replaced(tmp_path: Path, compilations: list[str]) -> None:
    graph = graph_with(Halving(), tmp_path)
    save_program(Dividing(), graph, tmp_path / "encode.pt2")
    with open_engine("pytorch-aot", graph, replace(ONE, plans=tmp_path / "plans")) as engine:
        assert isinstance(engine, StandIn)
        assert engine.wait(60)
        assert "encode.pt2: replaced after the bundle was opened" in str(engine.failure)
    assert not compilations


def test_a_package_that_cannot_be_kept_is_used_all_the_same(
    halving: GraphSpec, tmp_path: Path, compilations: list[str]
) -> None:
    (tmp_path / "plans").write_text("a file where the folder should be")
    with open_engine("pytorch-aot", halving, replace(ONE, plans=tmp_path / "plans")) as engine:
        assert isinstance(engine, StandIn)
        stand_in = engine.current
        assert engine.wait(60)
        assert engine.failure is None
        assert engine.current is not stand_in
    assert len(compilations) == 1


@pytest.mark.parametrize(
    "fault", ["another graph", "another precision", "another chip", "another torch", "damaged", "does not load"]
)
def test_a_package_that_does_not_fit_is_compiled_anew(
    halving: GraphSpec, tmp_path: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    options = replace(ONE, plans=tmp_path)
    open_twice(halving, options)
    key = PlanKey(
        halving.program_sha256,
        asked_of(halving),
        f"torch {torch.__version__}",
        pytorch.target("cpu"),
        "fp32",
        pytorch.ANY_BATCH,
    )
    match fault:
        case "another graph":
            halving = graph_with(Dividing(), tmp_path)
        case "another precision":
            options = replace(options, precision="bf16")
        case "another chip":
            monkeypatch.setattr(pytorch, "target", lambda device: "sm89")
        case "another torch":
            monkeypatch.setattr(torch, "__version__", "2.0.0")
        case "damaged":
            path = PlanCache(tmp_path).path(key)
            path.write_bytes(path.read_bytes()[:-1])
        case "does not load":
            PlanCache(tmp_path).save(key, b"no package")
    open_twice(halving, options)
    assert len(compilations) == 2


def test_a_program_that_does_not_compile_answers_uncompiled(
    halving: GraphSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> bytes:
        raise RuntimeError("there is no compiler")

    monkeypatch.setattr(pytorch, "compile_program", fail)
    with open_engine("pytorch-aot", halving, replace(ONE, plans=tmp_path)) as engine:
        assert isinstance(engine, StandIn)
        assert engine.wait(60)
        engine.warmup((1,))
    assert "stays on its stand-in: there is no compiler" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_compiled_step_is_the_program_in_that_precision(
    programmed: Bundle, tmp_path: Path, precision: Precision
) -> None:
    graph, options = graph_of(programmed, "step"), replace(ONE, plans=tmp_path, precision=precision)
    with open_engine("pytorch", graph, options) as program, open_engine("pytorch-aot", graph, options) as engine:
        assert isinstance(engine, StandIn)
        assert engine.wait(600)
        assert isinstance(engine.current, PytorchEngine)
        inputs = random_inputs(engine, 3)
        np.testing.assert_allclose(engine.run(inputs)["z_next"], program.run(inputs)["z_next"], atol=1e-3)
