"""The table of backends. A backend's library is imported when an engine of it is opened, not before."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from engines.backends.base import Engine, EngineError, GraphSpec

BACKENDS: dict[str, str] = {
    "ort": "engines.backends.ort:OrtEngine",
    "fake": "engines.backends.fake:FakeEngine",
}


def open_engine(backend: str, graph: GraphSpec, *, threads: int = 0) -> Engine:
    """Open ``graph`` on ``backend``; ``threads`` = 0 leaves the number of threads to the backend.

    Raises EngineError for an unknown backend, a missing library, or a graph that differs from its specs.
    """
    if backend not in BACKENDS:
        raise EngineError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
    module_name, _, factory_name = BACKENDS[backend].partition(":")
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise EngineError(f"backend {backend!r} cannot be imported: {error}") from error
    factory: Callable[..., Engine] = getattr(module, factory_name)
    return factory(graph, threads=threads)
