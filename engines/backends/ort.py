"""The ONNX Runtime backend: one graph in one session on the CPU. Knows no sampling and no images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from types import TracebackType
from typing import Any, Self

import onnxruntime as ort  # type: ignore[import-untyped, unused-ignore]

from engines.backends.base import Array, EngineError, GraphSpec, TensorSpec, check_arrays
from engines.backends.cores import usable_cores

_DTYPES = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(int32)": "int32"}


class OrtEngine:
    """An Engine on an ONNX Runtime session. ``run`` may be called from several threads."""

    def __init__(self, graph: GraphSpec, *, threads: int = 0) -> None:
        """Load ``graph`` on ``threads`` threads, 0 for one on every core the process may use.

        Raises EngineError where the file does not load or its inputs and outputs differ from the specs.
        """
        if threads < 0:
            raise EngineError(f"threads must not be negative, got {threads}")
        self._graph = graph
        self._name = graph.path.name
        self._outputs = [spec.name for spec in graph.outputs]
        try:
            session = ort.InferenceSession(
                str(graph.path), _options(threads or usable_cores()), providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the library's errors share no base class
            raise EngineError(f"{self._name}: ONNX Runtime cannot load it ({error})") from error
        _check_signature(self._name, "input", session.get_inputs(), graph.inputs)
        _check_signature(self._name, "output", session.get_outputs(), graph.outputs)
        self._session: ort.InferenceSession | None = session

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What `run` takes."""
        return self._graph.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What `run` gives."""
        return self._graph.outputs

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph once. Raises EngineError where the inputs break the specs or the graph fails."""
        session = self._session
        if session is None:
            raise EngineError(f"{self._name}: the engine is closed")
        batch = check_arrays(inputs, self.inputs, self._name)
        try:
            arrays = session.run(self._outputs, dict(inputs))
        except Exception as error:  # as above
            raise EngineError(f"{self._name}: {error}") from error
        outputs = dict(zip(self._outputs, arrays, strict=True))
        if check_arrays(outputs, self.outputs, f"{self._name} gave a wrong output") != batch:
            raise EngineError(f"{self._name}: its outputs have another batch size than its inputs")
        return outputs

    def warmup(self, batch_sizes: Sequence[int]) -> None:
        """Run once on zeros at every batch size."""
        for batch in batch_sizes:
            self.run({spec.name: spec.zeros(batch) for spec in self.inputs})

    def __enter__(self) -> Self:
        """Return the engine, which is open already."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Drop the session; a run in another thread ends first."""
        self._session = None


@cache
def _share_arena() -> None:
    """Give the process one CPU arena for all sessions, once.

    An arena for each session would keep the peak of every graph; one keeps the peak of the largest.
    """
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(memory, None)


def _options(threads: int) -> ort.SessionOptions:
    _share_arena()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.use_env_allocators", "1")
    # Memory patterns reserve a block for every batch size ever seen.
    options.enable_mem_pattern = False
    # Threads spin within a run, where it saves a tenth of its time, and sleep between runs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # int8 weights are unpacked when the graph loads instead of in every run.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


def _check_signature(graph: str, kind: str, found: Sequence[Any], specs: Sequence[TensorSpec]) -> None:
    """Raise EngineError where the graph's own inputs or outputs are not those of the specs."""
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
