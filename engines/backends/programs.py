"""The backends of PyTorch by name. torch is imported for a graph that has a program, and for no other.

A program is code, as torch reads it: open only those of people whom you would run code of.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from engines.backends.base import Engine, EngineError, EngineOptions, GraphSpec


def open_program(graph: GraphSpec, options: EngineOptions) -> Engine:
    """The program of a graph on the CPU, operator by operator. Raises EngineError without a program or torch."""
    engine: Engine = _pytorch(graph).PytorchEngine(graph, options)
    return engine


def open_aot(graph: GraphSpec, options: EngineOptions) -> Engine:
    """The program of a graph compiled for this CPU. Raises EngineError without a program or torch."""
    engine: Engine = _pytorch(graph).open_compiled(graph, options, "cpu")
    return engine


def open_cuda(graph: GraphSpec, options: EngineOptions) -> Engine:
    """The program of a graph compiled for the CUDA device. Raises EngineError without a program, torch or a device."""
    engine: Engine = _pytorch(graph).open_compiled(graph, options, "cuda")
    return engine


def _pytorch(graph: GraphSpec) -> Any:
    if graph.program is None:
        name = graph.path.name
        raise EngineError(f"the bundle has no program of {name}: write it with `fewstep export RECIPE OUT --programs`")
    try:
        return import_module("engines.backends.pytorch")
    except (ImportError, OSError) as error:
        raise EngineError(f"torch cannot be imported ({error}): pip install 'fewstep[pytorch]'") from error
