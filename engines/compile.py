"""A bundle's graphs made into plans: weights unpacked, precision cast and checked, compiled, kept. Runs no images."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import onnxruntime as ort

from engines.backends.base import Array, EngineError, GraphSpec
from engines.backends.cores import usable_cores
from engines.backends.cuda import Cuda
from engines.backends.faults import failure
from engines.backends.ort_session import check_signature, load_session, unpack_weights
from engines.backends.trt_library import Library, Progress, build_plan, check_target, find_library
from engines.bundle import Bundle
from engines.fidelity import asked_of, check_fidelity, check_finite, checked_inputs
from engines.hashes import check_unchanged
from engines.plans import PlanCache, PlanError, PlanKey, Precision, Profile


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
