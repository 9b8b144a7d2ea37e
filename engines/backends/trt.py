"""The TensorRT backend: one plan on the first CUDA device; built, if need be, while another engine answers."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from engines.backends.base import (
    STEP_INPUT,
    STEP_OUTPUT,
    Array,
    DeviceLostError,
    DeviceMemoryError,
    Engine,
    EngineError,
    EngineOptions,
    GraphEngine,
    GraphSpec,
    TensorSpec,
)
from engines.backends.cuda import Captured, Cuda, Pointer
from engines.backends.faults import kind_of
from engines.backends.ort import OrtCudaEngine, OrtEngine
from engines.backends.resident import Resident
from engines.backends.standin import StandIn, Wanted
from engines.backends.trt_library import Library, build_plan, check_target, error_logger, find_library, started
from engines.compile import prepare
from engines.fidelity import asked_of, check_engine
from engines.plans import PlanCache, PlanKey, Profile

_DTYPES = {"float32": "FLOAT", "int64": "INT64", "int32": "INT32"}
"""What TensorRT calls them."""

Failure = Callable[[str], EngineError]
"""The error of what failed, with what the library said of it."""

_log = logging.getLogger(__name__)


def open_trt(graph: GraphSpec, options: EngineOptions) -> Engine:
    """Open the plan of ``graph``; where none loads, ONNX Runtime answers until it is built.

    A plan is used once it was seen to give what ONNX Runtime gives; one that was built ahead is checked here. Raises
    EngineError without TensorRT or a CUDA device, and for a device that the library does not compile for.
    """
    library, cuda = find_library(), Cuda()
    if library.is_rtx:
        check_target(library, cuda.target)
    cache = PlanCache(options.plans)
    key = PlanKey(graph.sha256, asked_of(graph), library.name, cuda.target, options.precision, options.profile)
    plain = replace(options, precision="fp32")

    def opened(plan: bytes, profile: Profile, reference: Engine | None) -> Engine:
        """The engine of a plan, held to a reference where there is one, and warm."""
        with ExitStack() as closing:
            engine = closing.enter_context(TrtEngine(graph, plan, library, cuda, profile))
            if reference is not None:
                check_engine(engine, reference, graph, options.precision, profile.batch_sizes[-1])
            engine.warmup(options.profile.batch_sizes)
            closing.pop_all()
        return engine

    def kept() -> Engine | None:
        """The engine of a plan that is there; None without one that runs and gives what it should."""
        if (found := cache.find(key)) is None:
            return None
        own = replace(key, profile=found[1])
        try:
            if cache.is_checked(own):
                return opened(*found, None)
            with OrtEngine(graph, plain) as reference:  # on the CPU, as the plan may fit on the device only alone
                engine = opened(*found, reference)
            cache.mark_checked(own, found[0])
            return engine
        except DeviceLostError:
            raise
        except EngineError as error:
            _log.warning("a plan does not load or run as it should, and is built anew: %s", error)
            return None

    if (engine := kept()) is not None:
        return engine
    stand_in = _stand_in(graph, plain)

    def build(wanted: Wanted) -> Engine:
        with tempfile.TemporaryDirectory() as scratch:
            prepared, _ = prepare(graph, options.precision, Path(scratch))
            target = cuda.target if library.is_rtx else None
            made = build_plan(
                library, prepared, graph.inputs, options.profile, target, lambda *_: wanted(), graph.path.name
            )
        engine = opened(made, options.profile, stand_in)
        cache.keep(key, made)
        return engine

    return StandIn(stand_in, build, graph.path.name)


def _stand_in(graph: GraphSpec, options: EngineOptions) -> Engine:
    """ONNX Runtime on the device, or on the CPU where it has no provider for the device."""
    try:
        return OrtCudaEngine(graph, options)
    except EngineError:
        return OrtEngine(graph, options)


class TrtEngine(GraphEngine):
    """An Engine on a TensorRT plan. Runs of several threads take turns."""

    warm_runs = 2

    def __init__(self, graph: GraphSpec, plan: bytes, library: Library, cuda: Cuda, profile: Profile) -> None:
        """Load a plan that was built for `profile`. Raises EngineError for one that does not fit the graph."""
        super().__init__(graph)
        self._cuda, self._profile, self._module = cuda, profile, library.module
        self._logger = error_logger(library.module)
        self._runtime = started(library, "Runtime", self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise self._failure(f"{library.name} cannot load its plan")
        self._check_signature(self._engine)
        self._shapes: dict[int, _Shape] = {}
        self._lock = Lock()

    def _run(self, inputs: Mapping[str, Array], batch: int) -> dict[str, Array]:
        with self._lock:
            if self._engine is None:
                raise self._closed()
            try:
                place = self._profile.bucket(batch)
            except ValueError as error:
                raise EngineError(f"{self._name}: {error}") from error
            self._logger.last = ""
            if place not in self._shapes:
                self._shapes[place] = _Shape(
                    self._context(), self._graph, self._cuda, self._profile, place, self._failure
                )
            try:
                return self._shapes[place].run(inputs, batch)
            except EngineError:
                with suppress(EngineError):  # the next run makes it anew
                    self._shapes.pop(place).close()
                raise

    def _context(self) -> Any:
        """A context with room for its own profile alone: by default each would have as much as the largest.

        TensorRT-RTX would launch general kernels until those for a shape are compiled: they would be captured.
        """
        strategy = self._module.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        specialized = getattr(self._module, "DynamicShapesKernelSpecializationStrategy", None)
        if specialized is None:
            return self._engine.create_execution_context(strategy)
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        config.dynamic_shapes_kernel_specialization_strategy = specialized.EAGER
        return self._engine.create_execution_context(config)

    def _failure(self, what: str) -> EngineError:
        said = self._logger.last
        return kind_of(said)(f"{self._name}: {what} ({said or 'no reason given'})")

    def _check_signature(self, engine: Any) -> None:
        """Raise EngineError where the plan's tensors are not those of the specs; an open dimension fits any."""
        specs = {spec.name: spec for spec in (*self.inputs, *self.outputs)}
        found = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        if found != specs.keys():
            raise EngineError(f"{self._name}: its plan has {sorted(found)}; the manifest wants {sorted(specs)}")
        for name, spec in specs.items():
            shape, dtype = tuple(engine.get_tensor_shape(name)), engine.get_tensor_dtype(name).name
            fits = len(shape) == len(spec.shape) and all(
                isinstance(want, str) or have in (want, -1) for have, want in zip(shape, spec.shape, strict=True)
            )
            if not fits or dtype != _DTYPES[spec.dtype]:
                raise EngineError(f"{self._name}: its plan has {name} {dtype}{shape}; the manifest wants {spec}")

    def close(self) -> None:
        """Give the device's memory back; a run in another thread ends first."""
        with self._lock:
            try:
                with ExitStack() as closing:
                    closing.callback(self._cuda.close)
                    while self._shapes:
                        closing.callback(self._shapes.popitem()[1].close)
            finally:  # contexts go before the engine that they are of
                self._engine = self._runtime = None


class _Shape:
    """One optimisation profile of a plan: its context, its memory on the device, and its launches as one graph."""

    def __init__(
        self, context: Any, graph: GraphSpec, cuda: Cuda, profile: Profile, place: int, failure: Failure
    ) -> None:
        self._failure = failure
        self._graph, self._cuda, self._dynamic = graph, cuda, profile.dynamic
        self._largest = profile.ranges[place][2]
        self._context = context
        if self._context is None:
            raise DeviceMemoryError(f"{graph.path.name}: the device has no memory for a batch of {self._largest}")
        if not self._context.set_optimization_profile_async(place, cuda.stream):  # it has its memory from here on
            raise failure(f"there is no room for a batch of {self._largest}")
        self._resident: Resident[int] = Resident()
        self._pointers: dict[str, Pointer] = {}
        self._runs = 0
        self._captured: Captured | None = None
        try:
            for spec in (*graph.inputs, *graph.outputs):
                self._pointers[spec.name] = cuda.allocate(spec.zeros(self._largest).nbytes)
                if not self._context.set_tensor_address(spec.name, self._pointers[spec.name]):
                    raise failure(f"the plan takes no address for {spec.name}")
        except EngineError:
            self.close()
            raise

    def run(self, inputs: Mapping[str, Array], batch: int) -> dict[str, Array]:
        """Send what is not there, launch, and bring the outputs of the first `batch` rows back."""
        size = batch if self._dynamic else self._largest
        for spec in self._graph.inputs:
            if not self._context.set_input_shape(spec.name, spec.sized(size)):
                raise self._failure(f"the plan does not take {spec.name} at a batch of {size}")
            self._resident.get(spec.name, inputs[spec.name], partial(self._send, spec, size))
        (self._captured or self._execute)()
        outputs = {spec.name: np.empty(spec.sized(batch), spec.dtype) for spec in self._graph.outputs}
        for name, array in outputs.items():
            self._cuda.download(array, self._pointers[name])
        self._keep(outputs)
        self._cuda.synchronize()
        self._runs += 1
        if self._runs == 1 and not self._dynamic:  # a plain run first: it sets up what cannot be captured
            self._capture()
        return outputs

    def _capture(self) -> None:
        """Launch all in one call from now on; where that cannot be captured, one by one as before."""
        capturable = getattr(self._context, "is_stream_capturable", None)  # TensorRT-RTX has it
        if capturable is not None and not capturable(self._cuda.stream):
            _log.warning("%s: its launches cannot be captured", self._graph.path.name)
            return
        try:
            self._captured = self._cuda.capture(self._execute)
        except DeviceLostError:
            raise
        except EngineError as error:
            _log.warning("%s: its launches are not captured: %s", self._graph.path.name, error)

    def close(self) -> None:
        """Give the captured launches and the memory back."""
        with ExitStack() as closing:
            while self._pointers:
                closing.callback(self._cuda.free, self._pointers.popitem()[1])
            if self._captured is not None:
                self._captured.close()
            self._context = self._captured = None

    def _execute(self) -> None:
        if not self._context.execute_async_v3(self._cuda.stream):
            raise self._failure("TensorRT could not launch it")

    def _send(self, spec: TensorSpec, size: int, array: Array) -> int:
        """Copy an array to its place on the device; the rows of a fixed shape that are too many repeat the last one."""
        if len(array) < size:
            array = np.concatenate([array, np.repeat(array[-1:], size - len(array), axis=0)])
        self._cuda.upload(self._pointers[spec.name], np.ascontiguousarray(array))
        return size

    def _keep(self, outputs: Mapping[str, Array]) -> None:
        """What a step gives is what the next one takes: it stays on the device."""
        if self._graph.role != "step":
            return
        array = outputs[STEP_OUTPUT]
        array.flags.writeable = False
        self._cuda.move(self._pointers[STEP_INPUT], self._pointers[STEP_OUTPUT], array.nbytes)
        self._resident.put(STEP_INPUT, array, len(array))
