"""What every backend must do, whatever it runs on. Tolerances by backend are in one table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.backends import BACKENDS, open_engine, open_engines
from engines.backends.base import Array, Engine, EngineError, EngineOptions, GraphSpec
from engines.backends.fake import step
from engines.backends.standin import StandIn
from engines.bundle import Bundle, load_bundle
from engines.pipeline import noise_of

# What float32 may lose on each: between a row alone and the same row in a batch, or one equation and its graph.
TOLERANCE = {
    "fake": 1e-6,
    "ort": 1e-5,
    "ort-cuda": 1e-4,
    "ort-tensorrt": 1e-3,
    "trt": 1e-3,
    "pytorch": 1e-5,
    "pytorch-aot": 1e-5,
    "pytorch-cuda": 1e-4,
}
OF_PROGRAMS = {"pytorch", "pytorch-aot", "pytorch-cuda"}
COMPILES = "pytorch-aot"  # a graph in about five seconds


@pytest.fixture(autouse=True, scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder of plans for these tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_PLANS", str(tmp_path_factory.mktemp("plans")))
        yield


@pytest.fixture(scope="module")
def programmed(
    bundles: dict[tuple[str, str], Bundle], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Bundle]:
    """The bundles with a torch program of every graph."""
    pytest.importorskip("torch", reason="programs need torch")
    from tests.programs import with_programs

    return {kind: with_programs(made, tmp_path_factory.mktemp("programmed")) for kind, made in bundles.items()}


@cache
def why_not(backend: str, bundle: Path) -> str:
    """Why a backend does not work on this machine; nothing where it does."""
    try:
        open_engines(backend, load_bundle(bundle).graphs())
    except EngineError as error:
        return str(error)
    return ""


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow) if name == COMPILES else name for name in BACKENDS])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    kinds: dict[tuple[str, str], Bundle]
    kinds = request.getfixturevalue("programmed" if name in OF_PROGRAMS else "bundles")
    if reason := why_not(name, kinds["class", "pixel"].path):
        pytest.skip(f"{name}: {reason}")
    return name


@pytest.fixture
def bundle(bundle: Bundle, backend: str, request: pytest.FixtureRequest) -> Bundle:
    if backend not in OF_PROGRAMS:
        return bundle
    made: Bundle = request.getfixturevalue("programmed")[bundle.manifest.conditioning, bundle.manifest.space]
    return made


@pytest.fixture
def engine(bundle: Bundle, backend: str) -> Iterator[Engine]:
    with ready(backend, graph_of(bundle, "step")) as opened:
        yield opened


def ready(backend: str, graph: GraphSpec) -> Engine:
    """An engine that is what it will be."""
    opened = open_engine(backend, graph, EngineOptions(threads=1))
    if isinstance(opened, StandIn):
        assert opened.wait(600)
        assert opened.failure is None
    return opened


def graph_of(bundle: Bundle, role: str) -> GraphSpec:
    return [graph for graph in bundle.graphs().values() if graph.role == role][-1]


def random_inputs(engine: Engine, batch: int, seed: int = 0) -> dict[str, Array]:
    generator = np.random.default_rng(seed)
    inputs: dict[str, Array] = {}
    for spec in engine.inputs:
        shape = spec.sized(batch)
        if spec.dtype == "float32":
            inputs[spec.name] = generator.uniform(0.1, 0.9, shape).astype(np.float32)
        else:
            inputs[spec.name] = generator.integers(0, 2, shape).astype(spec.dtype)
    return inputs


def one_row(inputs: Mapping[str, Array], row: int) -> dict[str, Array]:
    return {name: array[row : row + 1] for name, array in inputs.items()}


def test_every_graph_honours_its_specs(bundle: Bundle, backend: str) -> None:
    for graph in bundle.graphs().values():
        with ready(backend, graph) as engine:
            assert (engine.inputs, engine.outputs) == (graph.inputs, graph.outputs)
            for batch in (1, 3):
                outputs = engine.run(random_inputs(engine, batch))
                assert {name: (str(array.dtype), array.shape) for name, array in outputs.items()} == {
                    spec.name: (spec.dtype, spec.sized(batch)) for spec in graph.outputs
                }


def test_same_inputs_give_same_outputs(engine: Engine) -> None:
    inputs = random_inputs(engine, 2)
    np.testing.assert_array_equal(engine.run(inputs)["z_next"], engine.run(inputs)["z_next"])


def test_how_arrays_lie_in_memory_does_not_matter(engine: Engine) -> None:
    inputs = random_inputs(engine, 2)
    turned = {name: np.asfortranarray(array) for name, array in inputs.items()}
    assert not all(array.flags.c_contiguous for array in turned.values())
    np.testing.assert_array_equal(engine.run(turned)["z_next"], engine.run(inputs)["z_next"])


def test_a_row_does_not_depend_on_its_company(engine: Engine, backend: str) -> None:
    inputs = random_inputs(engine, 5)
    together = engine.run(inputs)["z_next"]
    for row in range(5):
        alone = engine.run(one_row(inputs, row))["z_next"]
        np.testing.assert_allclose(together[row], alone[0], rtol=0, atol=TOLERANCE[backend])


def test_step_obeys_the_step_semantics(engine: Engine, backend: str) -> None:
    """From two calls that differ only in the next place on the grid, x and eps follow; a third must agree."""
    inputs = random_inputs(engine, 3) | {"keep": np.zeros((3, 1, *engine.outputs[0].sized(3)[2:]), np.float32)}

    def at(alpha_next: float, sigma_next: float, **others: Any) -> Array:
        scalars = {"alpha_next": np.full(3, alpha_next, np.float32), "sigma_next": np.full(3, sigma_next, np.float32)}
        return engine.run({**inputs, **scalars, **others})["z_next"]

    x, eps = at(1, 0), at(0, 1)
    np.testing.assert_allclose(at(0.6, 0.8), 0.6 * x + 0.8 * eps, atol=max(1e-5, TOLERANCE[backend]))
    alpha, sigma = (inputs[name].reshape(-1, 1, 1, 1) for name in ("alpha", "sigma"))
    np.testing.assert_allclose(alpha * x + sigma * eps, inputs["z"], atol=max(1e-5, TOLERANCE[backend]))
    keep = np.zeros_like(inputs["keep"])
    keep[:, :, :2] = 1
    mixed = at(0.6, 0.8, keep=keep)
    np.testing.assert_allclose(mixed[:, :, 2:], at(0.6, 0.8)[:, :, 2:], atol=max(1e-5, TOLERANCE[backend]))
    kept = 0.6 * inputs["known"] + 0.8 * inputs["noise"]
    np.testing.assert_allclose(mixed[:, :, :2], kept[:, :, :2], atol=max(1e-5, TOLERANCE[backend]))


def test_guidance_and_condition_matter(engine: Engine, bundle: Bundle) -> None:
    inputs = random_inputs(engine, 1)
    reference = engine.run(inputs)["z_next"]
    name = bundle.manifest.condition[0].name
    for change in ("guidance", name):
        changed = engine.run({**inputs, change: inputs[change] + np.ones_like(inputs[change])})["z_next"]
        assert np.abs(changed - reference).max() > 1e-3


def test_reference_step_keeps_the_whole_image() -> None:
    shape = (1, 3, 4, 4)
    scalars = {name: np.array([0.5], np.float32) for name in ("alpha", "sigma", "alpha_next", "sigma_next")}
    known, noise = (noise_of(seed, shape) for seed in (1, 2))
    keep = np.ones((1, 1, 4, 4), np.float32)
    inputs: dict[str, Array] = {"z": noise_of(0, shape), "known": known, "noise": noise, "keep": keep, **scalars}
    zeros = np.zeros(shape)
    np.testing.assert_allclose(step(zeros, zeros, inputs), 0.5 * known + 0.5 * noise)


def break_missing(inputs: dict[str, Array]) -> None:
    del inputs["time"]


def break_extra(inputs: dict[str, Array]) -> None:
    inputs["negative"] = inputs["time"]


def break_dtype(inputs: dict[str, Array]) -> None:
    inputs["z"] = inputs["z"].astype(np.float64)


def break_rank(inputs: dict[str, Array]) -> None:
    inputs["guidance"] = inputs["guidance"][:, None]


def break_size(inputs: dict[str, Array]) -> None:
    inputs["z"] = inputs["z"][:, :, :-1]


def break_batch(inputs: dict[str, Array]) -> None:
    inputs["keep"] = inputs["keep"][:1]


def break_empty(inputs: dict[str, Array]) -> None:
    inputs.update({name: array[:0] for name, array in inputs.items()})


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (break_missing, "missing time"),
        (break_extra, "unknown negative"),
        (break_dtype, "z is float64"),
        (break_rank, "guidance has shape"),
        (break_size, "z has shape"),
        (break_batch, "keep has shape"),
        (break_empty, "empty"),
    ],
)
def test_inputs_that_break_the_specs_are_named(engine: Engine, damage: Any, named: str) -> None:
    inputs = random_inputs(engine, 2)
    damage(inputs)
    with pytest.raises(EngineError, match=named):
        engine.run(inputs)


def test_warmup_takes_batch_sizes_and_leaves_no_trace(engine: Engine) -> None:
    inputs = random_inputs(engine, 2)
    before = engine.run(inputs)["z_next"]
    engine.warmup((1, 4))
    np.testing.assert_array_equal(engine.run(inputs)["z_next"], before)


def test_a_closed_engine_refuses_to_run(bundle: Bundle, backend: str) -> None:
    with open_engine(backend, graph_of(bundle, "step")) as engine:
        inputs = random_inputs(engine, 1)
    with pytest.raises(EngineError, match="closed"):
        engine.run(inputs)


def test_threads_may_share_an_engine(engine: Engine) -> None:
    batches = [random_inputs(engine, 2, seed) for seed in range(8)]
    expected = [engine.run(batch)["z_next"] for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for array, wanted in zip(pool.map(engine.run, batches), expected, strict=True):
            np.testing.assert_array_equal(array["z_next"], wanted)


@pytest.mark.parametrize("threads", [-1, 3_000_000_000])
def test_threads_that_make_no_sense_are_refused(threads: int) -> None:
    with pytest.raises(EngineError, match="threads must be 0 to 1024"):
        EngineOptions(threads=threads)
    with pytest.raises(EngineError, match="threads must be 0 to 1024"):
        EngineOptions(lone_threads=threads)


def test_unknown_backend_names_those_there_are(text_bundle: Bundle) -> None:
    with pytest.raises(EngineError, match=", ".join(BACKENDS)):
        open_engine("abacus", graph_of(text_bundle, "step"))


def test_backend_without_its_library_says_so(text_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "absent", "engines.backends.absent:Engine")
    with pytest.raises(EngineError, match="cannot be imported"):
        open_engine("absent", graph_of(text_bundle, "step"))
