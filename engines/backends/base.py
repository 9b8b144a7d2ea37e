"""The Engine seam: one compiled graph on one device. Knows names and shapes; knows nothing of sampling."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, field_validator

from engines.plans import Precision, Profile, batch_sizes_up_to

Array = NDArray[Any]
Role = Literal["text", "encode", "decode", "step"]
STEP_SCALARS = ("time", "alpha", "sigma", "alpha_next", "sigma_next", "guidance")
STEP_INPUT, STEP_OUTPUT = "z", "z_next"
STEP_ROWS = (STEP_INPUT, "known", "keep", "noise")
"""The tensors that every step graph has: its inputs besides the condition, numbers and arrays, and its output."""

GridPlace = tuple[float, float, float]
"""Of a grid: time, alpha and sigma."""

BATCH = "batch"
BATCH_SIZES = batch_sizes_up_to(16)
MAX_THREADS = 1024


class EngineError(Exception):
    """An engine could not be opened, was given inputs that break its specs, or failed while running."""


class DeviceMemoryError(EngineError):
    """The device has no memory left for what was asked: a smaller batch may fit."""


class DeviceLostError(EngineError):
    """The device failed so that nothing runs on it any more in this process: only a new process helps."""


@dataclass(frozen=True)
class EngineOptions:
    """How engines are opened: threads of a CPU (0 leaves them to the backend), and which plans, kept where.

    `lone_threads`, where they are more, are for a row that runs while no other engine of the process does: an engine
    whose threads are its own then holds its graph twice. Raises EngineError for a number of threads below 0 or above
    `MAX_THREADS`.
    """

    threads: int = 0
    precision: Precision = "fp32"
    profile: Profile = Profile(BATCH_SIZES)
    plans: Path | None = None
    lone_threads: int = 0

    def __post_init__(self) -> None:
        """Check the threads."""
        for threads in (self.threads, self.lone_threads):
            if not 0 <= threads <= MAX_THREADS:
                raise EngineError(f"threads must be 0 to {MAX_THREADS}, got {threads}")


class TensorSpec(BaseModel):
    """Name, dtype and shape of one graph input or output; a string dimension is symbolic."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    dtype: Literal["float32", "int64", "int32"]
    shape: tuple[int | str, ...]

    @field_validator("shape")
    @classmethod
    def _dimensions(cls, shape: tuple[int | str, ...]) -> tuple[int | str, ...]:
        if any(isinstance(dim, int) and dim < 1 for dim in shape):
            raise ValueError(f"dimensions must be positive, got {shape}")
        return shape

    def sized(self, batch: int) -> tuple[int, ...]:
        """The shape with ``batch`` in place of every symbolic dimension."""
        return tuple(batch if isinstance(dim, str) else dim for dim in self.shape)

    def zeros(self, batch: int) -> Array:
        """An array of zeros that honours this spec at batch size ``batch``."""
        return np.zeros(self.sized(batch), dtype=self.dtype)

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}({', '.join(str(dim) for dim in self.shape)})"


@dataclass(frozen=True)
class GraphSpec:
    """One graph of a bundle: where it lies, what it must take and give, and the SHA-256 that the manifest has of it.

    ``program`` is the same graph as a torch.export program, where the bundle has one. ``classes`` is how many labels
    there are, and ``tokenizers`` are those whose ids a text graph takes. ``files`` are those of the graph, its weights
    with it, and the SHA-256 of each. ``guidance`` are the least w that a step graph is asked for, the usual and the
    largest; ``places`` are where its first call begins and its last one, and where its path ends.
    """

    role: Role
    path: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    sha256: str = ""
    program: Path | None = None
    program_sha256: str = ""
    classes: int = 1
    tokenizers: tuple[Path, ...] = ()
    files: tuple[tuple[Path, str], ...] = ()
    guidance: tuple[float, ...] = (0.0,)
    places: tuple[GridPlace, GridPlace, GridPlace] = ((1.0, 0.0, 1.0), (1.0, 0.0, 1.0), (0.0, 1.0, 0.0))


class Engine(Protocol):
    """One compiled graph on one device. ``run`` may be called from several threads."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What `run` takes."""
        ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What `run` gives."""
        ...

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph once. Raises EngineError where the inputs break the specs or the graph fails."""
        ...

    def warmup(self, batch_sizes: Sequence[int]) -> None:
        """Run once on zeros at every batch size, so that later calls pay no first-use cost."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class GraphEngine(ABC):
    """What engines of one graph have in common: its specs, warming up on zeros, and closing at the end of a block."""

    warm_runs = 1
    """How often a size is run until nothing is left that only its first runs cost."""

    def __init__(self, graph: GraphSpec) -> None:
        """Take the specs of ``graph``."""
        self._graph = graph
        self._name = graph.path.name

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What `run` takes."""
        return self._graph.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What `run` gives."""
        return self._graph.outputs

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See Engine.run; what the graph gives is held to the specs too."""
        batch = check_arrays(inputs, self.inputs, self._name)
        outputs = self._run(inputs, batch)
        if check_arrays(outputs, self.outputs, f"{self._name} gave a wrong output") != batch:
            raise EngineError(f"{self._name}: its outputs have another batch size than its inputs")
        return outputs

    @abstractmethod
    def _run(self, inputs: Mapping[str, Array], batch: int) -> dict[str, Array]:
        """Run the graph once on inputs that fit its specs. Raises EngineError where it fails, or is closed."""

    def _closed(self) -> EngineError:
        return EngineError(f"{self._name}: the engine is closed")

    @abstractmethod
    def close(self) -> None:
        """Give back what the engine holds; a run in another thread ends first."""

    def warmup(self, batch_sizes: Sequence[int]) -> None:
        """See Engine.warmup."""
        for batch in batch_sizes:
            for _ in range(self.warm_runs):
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
        """Close the engine."""
        self.close()


def check_arrays(arrays: Mapping[str, Array], specs: Sequence[TensorSpec], what: str) -> int:
    """Check names, dtypes and shapes against ``specs`` and return the batch size they share.

    Raises EngineError naming the first array that does not fit; ``what`` opens its message.
    """
    expected = {spec.name for spec in specs}
    if missing := sorted(expected - arrays.keys()):
        raise EngineError(f"{what}: missing {', '.join(missing)}")
    if extra := sorted(arrays.keys() - expected):
        raise EngineError(f"{what}: unknown {', '.join(extra)}")
    sizes: dict[str, int] = {}
    for spec in specs:
        array = arrays[spec.name]
        if array.dtype != np.dtype(spec.dtype):
            raise EngineError(f"{what}: {spec.name} is {array.dtype}, expected {spec.dtype}")
        if array.ndim != len(spec.shape):
            raise EngineError(f"{what}: {spec.name} has shape {array.shape}, expected {spec}")
        for size, dim in zip(array.shape, spec.shape, strict=True):
            wanted = sizes.setdefault(dim, size) if isinstance(dim, str) else dim
            if size != wanted:
                raise EngineError(f"{what}: {spec.name} has shape {array.shape}, expected {spec} with {sizes}")
    batch = sizes.get(BATCH, 1)
    if batch < 1:
        raise EngineError(f"{what}: the batch is empty")
    return batch
