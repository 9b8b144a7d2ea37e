"""TensorRT or TensorRT-RTX, whichever is installed, and the building of plans with it. Needs no GPU for RTX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from engines.backends.base import EngineError, TensorSpec
from engines.plans import Profile

MODULES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")
INSTALL = "pip install 'fewstep[tensorrt]' or 'fewstep[tensorrt-rtx]'"

Progress = Callable[[str, int, int], bool]
"""Told of every phase of a build: its name, the steps that are done, and how many there are. Whether to go on."""


@dataclass(frozen=True)
class Library:
    """An installed TensorRT."""

    module: Any

    @property
    def is_rtx(self) -> bool:
        """Whether it is TensorRT-RTX, which compiles for chips that are not there."""
        return "rtx" in self.module.__name__

    @property
    def name(self) -> str:
        """The library and its version, as plans are keyed by it."""
        return f"{'tensorrt-rtx' if self.is_rtx else 'tensorrt'} {self.module.__version__}"

    @property
    def targets(self) -> tuple[str, ...]:
        """The chips that it compiles for by name, such as sm89; a TensorRT that is not RTX knows its own only."""
        if not self.is_rtx:
            return ()
        names = self.module.ComputeCapability.__members__
        return tuple(sorted((name.lower() for name in names if name.startswith("SM")), key=lambda name: int(name[2:])))


def find_library(check: Callable[[Library], object] = lambda library: None) -> Library:
    """The first of `MODULES` that is installed and loads, and for which `check` raises no EngineError.

    Raises EngineError naming what to install, or the reason of each that there is.
    """
    reasons = []
    for name in MODULES:
        try:
            library = Library(import_module(name))
            check(library)
        except (ImportError, OSError) as error:
            if not (isinstance(error, ModuleNotFoundError) and error.name == name):
                reasons.append(f"{name} is installed but its libraries do not load: {error}")
        except EngineError as error:
            reasons.append(str(error))
        else:
            return library
    raise EngineError("; ".join(reasons) or f"neither TensorRT nor TensorRT-RTX is installed: {INSTALL}")


def build_plan(
    library: Library,
    graph: Path,
    inputs: Sequence[TensorSpec],
    profile: Profile,
    target: str | None = None,
    progress: Progress | None = None,
    name: str | None = None,
) -> bytes:
    """Compile an ONNX graph, strongly typed, for a chip; None is the one that is there.

    Its inputs get the shapes of their specs, also where the graph leaves more open than the batch.

    Raises EngineError for a chip that the library does not compile for, for a graph that does not parse or build, for
    a build that `progress` ends, and where the library does not start; errors call the graph by `name`, or by that of
    the file.
    """
    trt = library.module
    logger = error_logger(trt)
    builder = started(library, "Builder", logger)
    flags = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # TensorRT 11 knows nothing else
    network = builder.create_network(0 if flags is None else 1 << int(flags))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        errors = "; ".join(str(parser.get_error(i).desc()) for i in range(parser.num_errors))
        raise EngineError(f"{name or graph.name}: {library.name} cannot parse it ({errors or logger.last})")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 means fp32
    if (user_allocation := getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)) is not None:
        config.set_flag(user_allocation)  # TensorRT-RTX's condition for launches to be captured
    _aim(library, config, target)
    for sizes in profile.ranges:
        config.add_optimization_profile(_shapes(builder, inputs, sizes))
    if progress is not None:
        config.progress_monitor = _monitor(trt, progress)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        reason = logger.last or "no reason given"
        raise EngineError(f"{name or graph.name}: {library.name} cannot build it ({reason})")
    return bytes(plan)


def check_target(library: Library, target: str) -> None:
    """Raise EngineError, naming those there are, for a chip that the library does not compile for by name."""
    if target not in library.targets:
        known = ", ".join(library.targets) or "the chip that is there only"
        raise EngineError(f"{library.name} does not compile for {target!r}; it does for {known}")


def _aim(library: Library, config: Any, target: str | None) -> None:
    if target is None:
        return
    check_target(library, target)
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(library.module.ComputeCapability, target.upper()), 0)


def _shapes(builder: Any, inputs: Sequence[TensorSpec], sizes: tuple[int, int, int]) -> Any:
    """A profile for batches of these sizes: the least, the usual and the largest."""
    profile = builder.create_optimization_profile()
    for spec in inputs:
        profile.set_shape(spec.name, *(spec.sized(size) for size in sizes))
    return profile


def started(library: Library, kind: str, logger: Any) -> Any:
    """The library's Builder or Runtime. Raises EngineError where it gives none, as without a GPU or its driver."""
    try:
        return getattr(library.module, kind)(logger)
    except TypeError as error:  # how the bindings put it
        reason = logger.last or "is there a GPU, and a driver that is new enough?"
        raise EngineError(f"{library.name} does not start: {reason}") from error


def error_logger(trt: Any) -> Any:
    """A logger that prints nothing and keeps the last error."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        last = ""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.last = message

    return Logger()


def _monitor(trt: Any, progress: Progress) -> Any:
    """The library's own progress monitor, which ends a build between its steps."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.steps[phase] = steps
            progress(phase, 0, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            return progress(phase, step + 1, self.steps.get(phase, step + 1))

        def phase_finish(self, phase: str) -> None:
            steps = self.steps.pop(phase, 0)
            progress(phase, steps, steps)

    return Monitor()
