"""What in a bundle differs from its manifest, in one line each."""

from __future__ import annotations

from collections.abc import Sequence

from engines.backends import open_engine
from engines.backends.base import EngineError, EngineOptions, GraphSpec
from engines.bundle import Bundle, BundleError, find_problems
from engines.fidelity import check_finite, checked_inputs, fidelity_db
from engines.manifest import WEIGHT_BITS
from engines.pipeline import open_tokenizer

ALIKE_DB = 50.0
"""What a row alone is at least to the same row in company; the order of sums makes a difference far below."""


def differences(bundle: Bundle) -> list[str]:
    """All there are: of its files, and of the tokenizer and the graphs whose files are whole, run once on the CPU.

    Raises OSError where the folder, or a file in it, cannot be read.
    """
    of_files = find_problems(bundle.path, bundle.manifest)
    damaged = {problem.partition(":")[0] for problem in of_files}
    graphs = list(bundle.graphs().values())
    whole = [graph for graph in graphs if damaged.isdisjoint(_names(graph))]
    tokenizers = () if bundle.manifest.text is None else bundle.manifest.text.tokenizers
    of_tokenizer = _of_tokenizer(bundle) if damaged.isdisjoint(tokenizers) else []
    of_graphs = [problem for graph in whole for problem in _of_graph(graph)]
    of_weights = _of_weights(bundle, graphs) if len(whole) == len(graphs) else []
    return [*of_files, *of_tokenizer, *of_graphs, *of_weights]


def _names(graph: GraphSpec) -> set[str]:
    """The files that a graph may be read from, or be checked by."""
    return {path.name for path, _ in graph.files} | {path.name for path in graph.tokenizers}


def _of_tokenizer(bundle: Bundle) -> list[str]:
    try:
        open_tokenizer(bundle)
    except BundleError as error:
        return [str(error)]
    return []


def _of_graph(graph: GraphSpec) -> list[str]:
    name = graph.path.name
    try:
        inputs = checked_inputs(graph)[-1]
        with open_engine("ort", graph, EngineOptions()) as engine:
            company = engine.run(inputs)
            check_finite(name, list(company.values()))
            alone = engine.run({key: array[:1] for key, array in inputs.items()})
    except EngineError as error:
        return [str(error)]
    if all(fidelity_db(alone[key], array[:1]) >= ALIKE_DB for key, array in company.items()):
        return []
    return [f"{name}: its rows are others in company than alone"]


def _of_weights(bundle: Bundle, graphs: Sequence[GraphSpec]) -> list[str]:
    """Graphs and files of weights that nothing reads, and weights that are narrower or wider than the manifest says.

    By both a service reckons the memory of a bundle.
    """
    try:
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

        from engines.weights import locations, storages
    except ModuleNotFoundError:
        return []
    try:
        read = {name for graph in graphs for name in locations(graph.path)}
        stored = {name for graph in graphs for name in storages(graph.path)}
    except DecodeError:  # which opening the graph has told of
        return []
    unread = [name for name in bundle.weights() if ".onnx" in name and name not in read]
    problems = [f"{name}: the manifest says nothing of it, and no graph reads it" for name in unread]
    said = min(bundle.manifest.weights_dtype.split("+"), key=WEIGHT_BITS.__getitem__)
    narrowest = min(stored, key=WEIGHT_BITS.__getitem__, default=said)
    if WEIGHT_BITS[narrowest] != WEIGHT_BITS[said]:
        problems.append(f"weights are said to be stored in {said} at the narrowest, and are in {narrowest}")
    return problems
