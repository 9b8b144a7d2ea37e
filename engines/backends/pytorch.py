"""The PyTorch backend: a torch.export program, run operator by operator or compiled by AOTInductor."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import Lock
from time import perf_counter

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from engines.backends.base import (
    STEP_INPUT,
    STEP_OUTPUT,
    Array,
    Engine,
    EngineError,
    EngineOptions,
    GraphEngine,
    GraphSpec,
)
from engines.backends.cores import usable_cores
from engines.backends.exported import (
    ANY_BATCH,
    DTYPES,
    Autocast,
    Call,
    Device,
    Tensors,
    compile_program,
    largest_batch,
    load_package,
    load_program,
    runnable,
    target,
)
from engines.backends.faults import failure, kind_of
from engines.backends.resident import Resident
from engines.backends.standin import StandIn, Wanted
from engines.fidelity import asked_of, check_engine, check_fidelity, checked_inputs
from engines.hashes import check_unchanged
from engines.plans import PlanCache, PlanKey, Precision

_log = logging.getLogger(__name__)


def open_compiled(graph: GraphSpec, options: EngineOptions, device: Device) -> Engine:
    """Open the AOTInductor package of ``graph``; where none loads, its program answers until it is compiled.

    Raises EngineError without such a device, or for a program that does not load or is not the graph's.
    """
    cache = PlanCache(options.plans)
    version = f"torch {torch.__version__}"
    key = PlanKey(graph.program_sha256, asked_of(graph), version, target(device), options.precision, ANY_BATCH)
    if (found := cache.find(key)) is not None:
        package, _ = found
        try:
            return PytorchEngine(graph, options, device, package)
        except EngineError as error:
            _log.warning("a package does not load, and is compiled anew: %s", error)

    def build(wanted: Wanted) -> Engine:
        assert graph.program is not None
        loaded = load_program(graph, device)
        check_unchanged([(graph.program, graph.program_sha256)])
        made = compile_program(loaded, options, device)
        del loaded  # Each engine has its own.
        if not wanted():
            raise EngineError(f"{graph.path.name}: closed while it was compiled")
        with ExitStack() as closing:
            engine = closing.enter_context(PytorchEngine(graph, options, device, made))
            with PytorchEngine(graph, options, device) as program:
                check_engine(engine, program, graph, options.precision, options.profile.batch_sizes[-1])
            engine.warmup(options.profile.batch_sizes)
            cache.keep(key, made)
            closing.pop_all()
        return engine

    return StandIn(PytorchEngine(graph, options, device), build, graph.path.name)


class PytorchEngine(GraphEngine):
    """An Engine on a program, or on a package that was compiled from it. Runs of several threads take turns.

    Arrays that did not change since the last run are not sent again. What it gives cannot be written to.
    """

    warm_runs = 2

    def __init__(
        self, graph: GraphSpec, options: EngineOptions, device: Device = "cpu", package: bytes | None = None
    ) -> None:
        """Load the program of ``graph``, or ``package`` with its weights, on so many threads, 0 for one on every core.

        Raises EngineError for what does not load, for a program that is not the graph's, and for one that comes out
        too far from fp32 in the precision of ``options``.
        """
        if options.precision not in DTYPES:
            raise EngineError(f"the backends of PyTorch compute in {', '.join(DTYPES)}, not in {options.precision}")
        super().__init__(graph)
        self._profile, self._device = options.profile, device
        self._threads = options.threads or usable_cores()
        self._lock = Lock()
        self._call: Call | None
        program = load_program(graph, device)
        if package is None:
            self._largest = largest_batch(program)
            self._call = self._lowered(program, options.precision)
        else:
            self._call, self._largest = load_package(self._name, package, program)
        self._places: dict[int, _Place | _FixedPlace] = {}

    def _run(self, inputs: Mapping[str, Array], batch: int) -> dict[str, Array]:
        if batch > self._largest:
            raise EngineError(f"{self._name}: a batch of {batch} is larger than its program's largest, {self._largest}")
        with self._lock, _threads(self._threads), _exact, torch.inference_mode():
            if self._call is None:
                raise self._closed()
            try:
                return self._place(batch).run(inputs, batch)
            except Exception as error:
                raise failure(self._name, error) from error

    def close(self) -> None:
        """Drop the program and what lies on the device; a run in another thread ends first."""
        with self._lock:
            self._call = None
            self._places.clear()

    def _lowered(self, program: ExportedProgram, precision: Precision) -> Call:
        """The program in a precision, checked against itself in fp32."""
        whole = runnable(program)
        if precision == "fp32":
            return whole
        lowered = Autocast(whole, self._device, DTYPES[precision])
        batches = [
            {name: send(array, self._device) for name, array in inputs.items()}
            for inputs in checked_inputs(self._graph)
        ]
        with _threads(self._threads), _exact, torch.inference_mode():
            found = [
                [value.cpu().numpy() for inputs in batches for value in call(inputs).values()]
                for call in (lowered, whole)
            ]
        check_fidelity(self._name, precision, *found)
        return lowered

    def _place(self, batch: int) -> _Place | _FixedPlace:
        """Where a batch runs: CUDA's launches are captured for the sizes of the profile, all else runs as it comes."""
        assert self._call is not None
        size = 0
        if captures(self._device) and not self._profile.dynamic and batch <= self._profile.batch_sizes[-1]:
            size = self._profile.batch_sizes[self._profile.bucket(batch)]
        if size not in self._places:
            make = partial(_FixedPlace, size=size) if size else _Place
            self._places[size] = make(self._call, self._graph, self._device)
        return self._places[size]


class _Place:
    """Runs batches of any size."""

    def __init__(self, call: Call, graph: GraphSpec, device: Device) -> None:
        self._call, self._graph = call, graph
        self._send = partial(send, device=device)
        self._resident: Resident[Tensor] = Resident()

    def run(self, inputs: Mapping[str, Array], batch: int) -> dict[str, Array]:
        """Send what is not there, run, and bring the outputs back."""
        outputs = self._call(
            {s.name: self._resident.get(s.name, inputs[s.name], self._send) for s in self._graph.inputs}
        )
        arrays = _arrays(outputs, batch)
        if self._graph.role == "step":  # what it gives is what the next tick takes
            self._resident.put(STEP_INPUT, arrays[STEP_OUTPUT], outputs[STEP_OUTPUT].contiguous())
        return arrays


class _FixedPlace:
    """Runs batches up to one size: its tensors stay where they are, so that its launches can be captured as one."""

    def __init__(self, call: Call, graph: GraphSpec, device: Device, size: int) -> None:
        self._call, self._graph, self._device = call, graph, device
        self._inputs = {spec.name: send(spec.zeros(size), device) for spec in graph.inputs}
        self._resident: Resident[int] = Resident()
        self._launch: Callable[[], Tensors] = lambda: call(self._inputs)
        self._runs = 0

    def run(self, inputs: Mapping[str, Array], batch: int) -> dict[str, Array]:
        """Send what is not there, launch, and bring the outputs of the first `batch` rows back."""
        for name in self._inputs:
            self._resident.get(name, inputs[name], partial(self._fill, name))
        outputs = self._launch()
        arrays = _arrays(outputs, batch)
        if self._graph.role == "step":  # what it gives is what the next tick takes
            self._inputs[STEP_INPUT][:batch].copy_(outputs[STEP_OUTPUT][:batch])
            self._resident.put(STEP_INPUT, arrays[STEP_OUTPUT], batch)
        self._runs += 1
        if self._runs == 1:  # a plain run first: it sets up what cannot be captured
            self._launch = self._captured()
        return arrays

    def _captured(self) -> Callable[[], Tensors]:
        try:
            return capture(lambda: self._call(self._inputs))
        except RuntimeError as error:
            _log.warning("%s: its launches are not captured: %s", self._graph.path.name, error)
            return self._launch

    def _fill(self, name: str, array: Array) -> int:
        """Copy an array to its place; the rows that are too many keep what they had."""
        self._inputs[name][: len(array)].copy_(send(array, self._device))
        return len(array)


def captures(device: Device) -> bool:
    """Whether launches on a device can be captured."""
    return device == "cuda"


def capture(launch: Callable[[], Tensors]) -> Callable[[], Tensors]:
    """What launches again, in one call, all that `launch` does on the CUDA device; the tensors stay the same."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other engines go on in their threads
        outputs = launch()

    def replay() -> Tensors:
        graph.replay()
        return outputs

    return replay


def time_products(matrix: Array, count: int, options: EngineOptions, device: Device) -> float:
    """Seconds that torch's own product with a square matrix takes, so many times in a row; none is sent meanwhile.

    Raises EngineError where the device fails, or has no memory for it.
    """
    try:
        factor = send(matrix, device).to(DTYPES[options.precision])
        with _threads(options.threads or usable_cores()), torch.inference_mode():
            start = perf_counter()
            product = factor
            for _ in range(count):
                product = product @ factor
            product[0, 0].item()  # waits for the device
            return perf_counter() - start
    except RuntimeError as error:
        raise kind_of(str(error))(f"products of matrices cannot be timed: {error}") from error


def used_bytes() -> int:
    """Memory of the CUDA device that is taken now, by whomever."""
    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def send(array: Array, device: Device) -> Tensor:
    """A contiguous copy of an array on a device: compiled packages take it for that."""
    return torch.tensor(np.ascontiguousarray(array), device=device)


def _arrays(tensors: Tensors, rows: int) -> dict[str, Array]:
    """The first rows of tensors, on the host. The memory may still be the tensors', so nobody may write to it."""
    arrays: dict[str, Array] = {name: np.asarray(value[:rows].cpu().numpy()) for name, value in tensors.items()}
    for array in arrays.values():
        array.flags.writeable = False
    return arrays


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute on so many threads. torch has one number for the whole process, so it is put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Exact:
    """Within, float32 is convolved as it is: cuDNN would in TF32, which keeps ten bits of it.

    torch has one switch for all threads: the first to enter turns it off, the last to leave puts it back.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._before = Lock(), 0, False

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = torch.backends.cudnn.allow_tf32
                torch.backends.cudnn.allow_tf32 = False
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                torch.backends.cudnn.allow_tf32 = self._before


_exact = _Exact()
