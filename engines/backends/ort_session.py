"""Sessions of ONNX Runtime: how a graph is loaded, and held to what the manifest says of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort  # type: ignore[import-untyped, unused-ignore]

from engines.backends.base import EngineError, GraphSpec, TensorSpec
from engines.backends.faults import failure

CPU = "CPUExecutionProvider"
_DTYPES = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(int32)": "int32"}


def load_session(path: Path, options: ort.SessionOptions, providers: Sequence[Any] = (CPU,)) -> ort.InferenceSession:
    """A session on a graph. Raises EngineError, of the kind of the failure, where it does not load."""
    try:
        # Its own fallback would hide the reason, and print on stdout.
        return ort.InferenceSession(str(path), options, providers=list(providers), enable_fallback=0)
    except Exception as error:
        raise failure(f"{path.name}: ONNX Runtime cannot load it", error) from error


def unpack_weights(options: ort.SessionOptions) -> None:
    """Have weights of 8 bits unpacked when a graph loads, whatever their type and zero point, and not in every run."""
    options.add_session_config_entry("session.disable_quant_qdq", "1")


def check_signature(session: ort.InferenceSession, graph: GraphSpec) -> None:
    """Raise EngineError where the graph's own inputs or outputs are not those of the specs."""
    _check_nodes(graph.path.name, "input", session.get_inputs(), graph.inputs)
    _check_nodes(graph.path.name, "output", session.get_outputs(), graph.outputs)


def _check_nodes(graph: str, kind: str, found: Sequence[Any], specs: Sequence[TensorSpec]) -> None:
    nodes = {node.name: node for node in found}
    expected = {spec.name for spec in specs}
    if nodes.keys() != expected:
        has, wants = ", ".join(sorted(nodes)), ", ".join(sorted(expected))
        raise EngineError(f"{graph}: its {kind}s are {has}; the manifest wants {wants}")
    for spec in specs:
        node = nodes[spec.name]
        if _DTYPES.get(node.type) != spec.dtype or not _shape_fits(node.shape, spec.shape):
            raise EngineError(f"{graph}: {kind} {spec.name} is {node.type}{node.shape}; the manifest wants {spec}")


def _shape_fits(found: Sequence[int | str | None], wanted: Sequence[int | str]) -> bool:
    """A symbolic dimension must be symbolic in the graph; a fixed one may be either, runs check the rest."""
    return len(found) == len(wanted) and all(
        not isinstance(have, int) if isinstance(want, str) else have == want or not isinstance(have, int)
        for have, want in zip(found, wanted, strict=True)
    )
