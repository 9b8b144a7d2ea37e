"""The table of backends. A backend's library is imported when an engine of it is opened, not before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import import_module

from engines.backends.base import Engine, EngineError, EngineOptions, GraphSpec
from engines.backends.faults import kind_of
from engines.plans import PlanError

BACKENDS: dict[str, str] = {
    "trt": "engines.backends.trt:open_trt",
    "pytorch-cuda": "engines.backends.programs:open_cuda",
    "ort-tensorrt": "engines.backends.ort:OrtTensorrtEngine",
    "ort-cuda": "engines.backends.ort:OrtCudaEngine",
    "ort": "engines.backends.ort:OrtEngine",
    "pytorch-aot": "engines.backends.programs:open_aot",
    "pytorch": "engines.backends.programs:open_program",
    "fake": "engines.backends.fake:FakeEngine",
}
KEEP_PLANS = ("trt", "ort-tensorrt", "pytorch-cuda", "pytorch-aot")
"""Those that compile, and keep what they have compiled."""
AUTO = "auto"
BEST_FIRST = ("trt", "pytorch-cuda", "ort-cuda", "ort-tensorrt", "ort", "pytorch-aot", "pytorch")
"""What `auto` tries, in this order: GPUs first. ort-tensorrt multiplies float32 in TF32, which ort-cuda does not."""


@dataclass(frozen=True)
class Opened:
    """The engines of a bundle by the file name of their graph, and why `auto` passed over better backends."""

    backend: str
    engines: Mapping[str, Engine]
    passed_over: Mapping[str, str] = field(default_factory=dict)


def open_engine(backend: str, graph: GraphSpec, options: EngineOptions = EngineOptions()) -> Engine:
    """Open ``graph`` on ``backend``.

    Raises EngineError for an unknown backend, a missing library, no folder for plans, or a graph that differs from its
    specs; the kinds that `kind_of` tells apart, for whatever else fails while it opens.
    """
    if backend not in BACKENDS:
        raise EngineError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
    module_name, _, factory_name = BACKENDS[backend].partition(":")
    try:
        module = import_module(module_name)
    except Exception as error:  # of a library that is missing, or that does not load
        raise EngineError(f"backend {backend!r} cannot be imported: {error}") from error
    factory: Callable[[GraphSpec, EngineOptions], Engine] = getattr(module, factory_name)
    try:
        return factory(graph, options)
    except EngineError:
        raise
    except PlanError as error:
        raise EngineError(f"backend {backend!r}: {error}") from error
    except Exception as error:  # the errors of the libraries share no base class
        said = f"{type(error).__name__}: {error}"
        raise kind_of(said)(f"backend {backend!r}: {graph.path.name}: {said}") from error


def open_engines(backend: str, graphs: Mapping[str, GraphSpec], options: EngineOptions = EngineOptions()) -> Opened:
    """Open every graph on ``backend``; ``auto`` is the first of `BEST_FIRST` that opens them all and runs them once.

    Raises EngineError as `open_engine` does; then none is left open.
    """
    if backend != AUTO:
        return Opened(backend, _open_all(backend, graphs, options))
    passed_over: dict[str, str] = {}
    for name in BEST_FIRST:
        try:
            engines = _open_all(name, graphs, options, tried=True)
        except EngineError as error:
            passed_over[name] = str(error)
        else:
            return Opened(name, engines, passed_over)
    raise EngineError("no backend runs the bundle; " + "; ".join(f"{k}: {why}" for k, why in passed_over.items()))


def _open_all(
    backend: str, graphs: Mapping[str, GraphSpec], options: EngineOptions, tried: bool = False
) -> dict[str, Engine]:
    with ExitStack() as opened:
        engines = {name: opened.enter_context(open_engine(backend, graph, options)) for name, graph in graphs.items()}
        if tried:  # a device may be there and yet run nothing: its driver too old, its memory full
            for engine in engines.values():
                engine.warmup((1,))
        opened.pop_all()
    return engines
