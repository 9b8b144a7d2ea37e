"""A bundle's graphs made into plans: weights unpacked, precision cast and checked, compiled, kept. Runs no images."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import onnxruntime as ort

from engines.backends.base import Array, Engine, EngineError, GraphSpec
from engines.backends.cores import usable_cores
from engines.backends.cuda import Cuda
from engines.backends.faults import failure
from engines.backends.ort import check_signature, load_session, unpack_weights
from engines.backends.trt_library import Library, Progress, build_plan, check_target, find_library
from engines.bundle import Bundle
from engines.decibels import psnr_db
from engines.hashes import check_unchanged
from engines.manifest import ATTENTION_MASK, IDS, LABEL, SECOND_IDS
from engines.plans import PlanCache, PlanError, PlanKey, Precision, Profile
from engines.tokenizer import TokenizerError, vocabulary_size

FLOOR_DB = 30.0
"""The least peak signal-to-noise ratio, to the graph in fp32, of the output of a graph in a lower precision."""
CHECKED_ROWS = 2


@dataclass(frozen=True)
class Built:
    """A plan that is there now, where it lies, how long it took (0 if it was there before), and its fidelity in dB.

    Fidelity is the worst on `checked_inputs`, with every value rounded to the precision, against fp32; None where
    nothing is rounded.
    """

    graph: str
    key: PlanKey
    path: Path
    size_bytes: int
    seconds: float
    fidelity_db: float | None


def build_bundle(
    bundle: Bundle,
    profile: Profile,
    precision: Precision = "fp32",
    target: str | None = None,
    cache: PlanCache | None = None,
    progress: Callable[[str], Progress] | None = None,
    library: Library | None = None,
) -> Iterator[Built]:
    """Build a plan of every graph of a bundle that has none yet, one by one.

    `progress(graph)` is told of the build of that graph. Raises EngineError for a graph that does not build, or that
    falls below `FLOOR_DB` in that precision, and PlanError where plans cannot be kept.
    """
    library = library or find_library(lambda found: _chip(found, target))
    cache = cache or PlanCache()
    chip = _chip(library, target)
    for name, graph in bundle.graphs().items():
        key = PlanKey(graph.sha256, asked_of(graph), library.name, chip, precision, profile)
        try:
            plan = cache.load(key)
        except PlanError:
            plan = None
        if plan is not None:
            yield Built(name, key, cache.path(key), len(plan), 0.0, None)
            continue
        cache.check_writable()  # before the minutes that a build may take
        started = perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            prepared, fidelity = prepare(graph, precision, Path(scratch))
            named = chip if library.is_rtx else None
            plan = build_plan(library, prepared, graph.inputs, profile, named, progress and progress(name), name)
        path = cache.save(key, plan)
        yield Built(name, key, path, len(plan), perf_counter() - started, fidelity)


def _chip(library: Library, target: str | None) -> str:
    """The chip to build for: the one named, or the one that is there; only TensorRT-RTX builds for another one."""
    if target is not None and library.is_rtx:
        check_target(library, target)
        return target
    try:
        here = Cuda().target
    except EngineError as error:
        known = f"; name one of {', '.join(library.targets)}" if library.is_rtx else ""
        raise EngineError(f"no chip to build for was found ({error}){known}") from error
    if target not in (None, here):
        raise EngineError(f"{library.name} builds for the chip that is there only, {here}, not for {target}")
    return here


def prepare(graph: GraphSpec, precision: Precision, folder: Path) -> tuple[Path, float | None]:
    """The graph as compilers take it, in `folder`, and its fidelity: weights unpacked to fp32, then cast.

    Raises EngineError for a graph that does not load, that differs from its specs, that gives values that are not
    finite, whose files were replaced, or whose fidelity is below `FLOOR_DB`, for a folder that cannot be written to,
    and without the package onnx in any precision but fp32.
    """
    try:
        return _prepare(graph, precision, folder)
    except OSError as error:
        why = f"{error.strerror or error}; TMPDIR can name another folder"
        raise EngineError(f"{graph.path.name}: cannot be prepared in {folder}: {why}") from error


def _prepare(graph: GraphSpec, precision: Precision, folder: Path) -> tuple[Path, float | None]:
    name = graph.path.name
    unpacked = unpack(graph, folder / f"unpacked-{name}")
    check_unchanged(graph.files)
    batches = checked_inputs(graph)
    whole = _run(unpacked, batches, name)
    check_finite(name, whole)
    if precision == "fp32":
        return unpacked, None
    emulated, lowered = (folder / f"{prefix}-{name}" for prefix in ("emulated", precision))
    rewrite(unpacked, precision, emulated, emulated=True, name=name)
    fidelity = check_fidelity(name, precision, _run(emulated, batches, name), whole)
    rewrite(unpacked, precision, lowered, name=name)
    return lowered, fidelity


def rewrite(unpacked: Path, precision: Precision, out: Path, emulated: bool = False, name: str | None = None) -> None:
    """Write a graph that `unpack` wrote to another file beside it, cast to a precision.

    Where it is `emulated`, it computes in fp32 and rounds where the other casts; it is to be run without optimisations,
    which remove the rounding. Raises EngineError for a graph that cannot be cast, and without the package onnx; errors
    call the graph by `name`, or by that of the file.
    """
    try:
        import onnx

        from engines.precision import cast, emulate
        from engines.weights import Writer
    except ImportError as error:
        raise EngineError(
            f"casting a graph to {precision} needs the package onnx ({error}): pip install onnx"
        ) from error
    model = onnx.load(unpacked, load_external_data=False)
    try:
        made = (emulate if emulated else cast)(model, precision, out.parent, Writer(out, outside=True))
    except ValueError as error:
        raise EngineError(f"{name or out.name}: {error}") from error
    onnx.save(made, out)


def unpack(graph: GraphSpec, out: Path) -> Path:
    """The graph with its stored weights (int8 or fp16 with what restores them) computed once; of standard operators.

    All but small weights go to a file of their own beside it. Raises EngineError for a graph that does not load or that
    differs from its specs, OSError for a folder that takes no more.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(out)
    options.log_severity_level = 3
    options.intra_op_num_threads = usable_cores()
    unpack_weights(options)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{out.name}.weights")
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    try:
        session = load_session(graph.path, options)
    except EngineError:
        _check_writable(out.parent)
        raise
    check_signature(session, graph)
    return out


def _check_writable(folder: Path) -> None:
    """Raise OSError for a folder that takes no more: what failed may have been the writing of a graph, not its load."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(1 << 16))


def check_finite(name: str, outputs: Sequence[Array]) -> None:
    """Raise EngineError where a graph gives, on typical inputs and in fp32, values that are not finite."""
    if not all(np.isfinite(array).all() for array in outputs):
        raise EngineError(f"{name}: in fp32 it gives values that are not finite")


def check_fidelity(name: str, precision: Precision, lowered: Sequence[Array], whole: Sequence[Array]) -> float:
    """The PSNR in dB of a graph's outputs in a precision, to those in fp32.

    Raises EngineError below `FLOOR_DB`, and where those in fp32 are not finite.
    """
    check_finite(name, whole)
    fidelity = min(fidelity_db(a, b) for a, b in zip(lowered, whole, strict=True))
    if not fidelity >= FLOOR_DB:
        raise EngineError(f"{name}: in {precision} it is at {fidelity:.1f} dB to fp32, below {FLOOR_DB:g} dB")
    return fidelity


def check_engine(engine: Engine, reference: Engine, graph: GraphSpec, precision: Precision, rows: int) -> None:
    """Hold an engine on a graph in a precision to one in fp32, so many rows at a time.

    Raises EngineError as `check_fidelity` does, and as either engine.
    """
    for inputs in (typical_inputs(graph, 1), *checked_inputs(graph)):
        check_fidelity(graph.path.name, precision, _run_by(rows, engine, inputs), _run_by(rows, reference, inputs))


def _run_by(rows: int, engine: Engine, inputs: Mapping[str, Array]) -> list[Array]:
    batch = len(next(iter(inputs.values())))
    parts = [
        engine.run({name: array[start : start + rows] for name, array in inputs.items()})
        for start in range(0, batch, rows)
    ]
    return [np.concatenate([part[name] for part in parts]) for name in parts[0]]


def fidelity_db(actual: Array, expected: Array) -> float:
    """The peak signal-to-noise ratio, the peak being the range of what is expected; -inf where values are not finite.

    It is the worse of that of all values and that of all but their outermost hundredths: in the range of a few outliers
    the loss of all else would be nothing.
    """
    if not np.isfinite(actual).all():
        return -math.inf
    squares = np.square(actual.astype(np.float64) - expected)
    low, high = (float(value) for value in np.percentile(expected, (1, 99), method="nearest"))
    inner = squares[(low <= expected) & (expected <= high)]
    peak = float(np.ptp(expected)) or 1.0
    return min(psnr_db(float(squares.mean()), peak), psnr_db(float(inner.mean()), high - low or peak))


def checked_inputs(graph: GraphSpec) -> list[dict[str, Array]]:
    """Batches of `CHECKED_ROWS` at the ends of what a service may ask of a graph: one for each w, the largest last.

    The rows of a step are at the first and the last place where it is called, and go to the end of its path at once:
    then z_next is what the network predicts, and no part of z hides it. They have the first and the last class, and the
    first text ends in the last id of its tokenizer. Raises EngineError as `typical_inputs` does.
    """
    inputs = typical_inputs(graph, CHECKED_ROWS)
    *called, (_, alpha_next, sigma_next) = graph.places
    time, alpha, sigma = np.array(called).T
    ends = {
        **{"time": time, "alpha": alpha, "sigma": sigma},
        **{"alpha_next": np.full(CHECKED_ROWS, alpha_next), "sigma_next": np.full(CHECKED_ROWS, sigma_next)},
        LABEL: np.array([0, graph.classes - 1]),
    }
    for name in inputs.keys() & {IDS, SECOND_IDS}:
        inputs[name][0, -1] = _vocabulary(graph, name) - 1
    inputs |= {name: ends[name].astype(inputs[name].dtype) for name in inputs.keys() & ends.keys()}
    if "guidance" not in inputs:
        return [inputs]
    return [inputs | {"guidance": np.full(CHECKED_ROWS, w, np.float32)} for w in graph.guidance]


def asked_of(graph: GraphSpec) -> str:
    """What is asked of a graph, as plans are keyed by it: the shapes, dtypes and values of `checked_inputs`, hashed."""
    digest = hashlib.sha256()
    for inputs in checked_inputs(graph):
        for name, array in sorted(inputs.items()):
            digest.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()


def typical_inputs(graph: GraphSpec, batch: int) -> dict[str, Array]:
    """Inputs as a service gives them: noise at different places of a variance-preserving grid, w of 0 and more.

    Classes come in turn; of texts, the first is as long as any, and the last a quarter of that. Raises EngineError for
    a tokenizer that cannot be read or has no tokens.
    """
    generator = np.random.default_rng(0)
    time = np.linspace(1, 0.25, batch, dtype=np.float32)
    alpha, sigma = np.cos(time * np.pi / 2), np.sin(time * np.pi / 2)
    scalars = {
        "time": time,
        "alpha": alpha,
        "sigma": sigma,
        "alpha_next": np.cos(time * np.pi / 4),
        "sigma_next": np.sin(time * np.pi / 4),
        "guidance": np.arange(batch, dtype=np.float32),
    }
    inputs: dict[str, Array] = {}
    for spec in graph.inputs:
        shape = spec.sized(batch)
        if spec.name in scalars:
            inputs[spec.name] = scalars[spec.name].astype(np.float32)
        elif spec.name == "keep":
            inputs[spec.name] = np.zeros(shape, np.float32)
        elif spec.name == LABEL:
            inputs[spec.name] = np.arange(batch, dtype=spec.dtype) % graph.classes
        elif spec.name == ATTENTION_MASK:
            lengths = np.ceil(np.linspace(1, 0.25, batch) * shape[1])
            inputs[spec.name] = (np.arange(shape[1]) < lengths[:, None]).astype(spec.dtype)
        elif spec.dtype == "float32":
            inputs[spec.name] = generator.standard_normal(shape, np.float32)
        else:
            inputs[spec.name] = generator.integers(0, _vocabulary(graph, spec.name), shape, spec.dtype)
    return inputs


def _vocabulary(graph: GraphSpec, name: str) -> int:
    """How many ids there are for an input of a text graph; 2 where its tokenizer is not known."""
    if not graph.tokenizers:
        return 2
    try:
        size = vocabulary_size(graph.tokenizers[-1 if name == SECOND_IDS else 0])
    except TokenizerError as error:
        raise EngineError(str(error)) from error
    if not size:
        raise EngineError(f"{graph.path.name}: its tokenizer has no tokens")
    return size


def _run(path: Path, batches: Sequence[dict[str, Array]], name: str) -> list[Array]:
    """The outputs of every batch, one after the other."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # these remove the rounding
    options.intra_op_num_threads = usable_cores()
    options.log_severity_level = 3
    session = load_session(path, options)
    try:
        return [array for inputs in batches for array in session.run(None, inputs)]
    except Exception as error:
        raise failure(f"{name}: ONNX Runtime cannot run it", error) from error
