"""How many operations a graph takes: counted from the shapes that ONNX Runtime sees when it runs it."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort  # type: ignore[import-untyped, unused-ignore]

from engines.backends.base import EngineError, GraphSpec
from engines.backends.faults import failure
from engines.backends.ort_session import load_session
from engines.fidelity import typical_inputs

Shape = Sequence[int]


def count_operations(graph: GraphSpec) -> int:
    """Multiplications and additions of the graph's products and convolutions, on one row.

    All else that it does is left out, as is usual. Raises EngineError for a graph that does not run.
    """
    return sum(_of_node(node["args"]) for node in _profile(graph) if node["name"].endswith("_kernel_time"))


def _profile(graph: GraphSpec) -> list[dict[str, Any]]:
    options = ort.SessionOptions()
    # Basic: fused nodes of other levels keep the shapes to themselves.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_prepacking", "1")  # packed weights have no shape
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "run")
        session = load_session(graph.path, options)
        try:
            session.run(None, typical_inputs(graph, 1))
        except Exception as error:
            raise failure(f"{graph.path.name}: ONNX Runtime cannot run it", error) from error
        try:
            nodes: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise EngineError(
                f"{graph.path.name}: what ONNX Runtime measured was not written whole: {error}"
            ) from error
    return nodes


def _of_node(node: dict[str, Any]) -> int:
    kind = node["op_name"].removeprefix("Fused")
    inputs, outputs = (_shapes(node[f"{side}_type_shape"]) for side in ("input", "output"))
    if kind == "Conv":
        return 2 * math.prod(outputs[0]) * math.prod(inputs[1][1:])
    if kind == "ConvTranspose":
        return 2 * math.prod(inputs[0]) * math.prod(inputs[1][1:])
    if kind == "MatMul":
        return 2 * math.prod(outputs[0]) * inputs[0][-1]
    if kind == "Gemm":
        return 2 * outputs[0][0] * math.prod(inputs[1])
    return 0


def _shapes(typed: Sequence[dict[str, list[int]]]) -> list[Shape]:
    """Of `[{"float": [1, 3]}, ...]`."""
    return [shape for one in typed for shape in one.values()]
