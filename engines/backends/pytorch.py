"""The PyTorch backend: a torch.export program, run operator by operator or compiled by AOTInductor.

The tests cover the CPU, and passed on an H100: docs/on-a-gpu.md.
"""

from __future__ import annotations

import hashlib
import io
import logging
import platform
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.passes import move_to_device_pass
from torch.fx.experimental import _config as symbolic_shapes
from torch.utils import _pytree as pytree

from engines.backends.base import (
    BATCH,
    Array,
    Engine,
    EngineError,
    EngineOptions,
    GraphEngine,
    GraphSpec,
    TensorSpec,
    check_arrays,
)
from engines.backends.cores import usable_cores
from engines.backends.faults import kind_of
from engines.backends.resident import Resident
from engines.backends.standin import StandIn
from engines.compile import CHECKED_ROWS, check_fidelity, typical_inputs
from engines.plans import PlanCache, PlanKey, Precision, Profile

Device = Literal["cpu", "cuda"]
Tensors = dict[str, Tensor]
Call = Callable[[Tensors], Tensors]

ANY_BATCH = Profile((1024,), dynamic=True)
"""A package is made for every batch that its program takes, whatever sizes are asked for."""

_STEP_OUTPUT, _STEP_INPUT = "z_next", "z"
_LARGEST = "largest_batch"
_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_one_at_a_time = Lock()
"""torch.export keeps what it is doing in global variables, and packages are compiled in a thread of their own."""

_log = logging.getLogger(__name__)


def open_compiled(graph: GraphSpec, options: EngineOptions, device: Device) -> Engine:
    """Open the AOTInductor package of ``graph``; where there is none, its program answers until it is compiled.

    Raises EngineError without such a device, or for a program that does not load or is not the graph's.
    """
    cache = PlanCache(options.plans)
    version = f"torch {torch.__version__}"
    key = PlanKey(graph.program_sha256, version, target(device), options.precision, ANY_BATCH)
    if (found := cache.find(key)) is not None:
        package, _ = found
        return PytorchEngine(graph, options, device, package)

    def build() -> Engine:
        made = compile_program(load_program(graph, device), options, device)
        with ExitStack() as closing:
            engine = closing.enter_context(PytorchEngine(graph, options, device, made))
            with PytorchEngine(graph, options, device) as program:
                for rows in (1, CHECKED_ROWS):
                    inputs = typical_inputs(graph, rows)
                    found = [list(either.run(inputs).values()) for either in (engine, program)]
                    check_fidelity(graph.path.name, options.precision, *found)
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
        """Load the program of ``graph``, or ``package``, on the threads of ``options``, 0 for one on every core.

        Raises EngineError for what does not load, for a program that is not the graph's, and for one that comes out
        too far from fp32 in the precision of ``options``.
        """
        if options.precision not in _DTYPES:
            raise EngineError(f"the backends of PyTorch compute in {', '.join(_DTYPES)}, not in {options.precision}")
        super().__init__(graph)
        self._profile, self._device = options.profile, device
        self._threads = options.threads or usable_cores()
        self._lock = Lock()
        self._call: Call | None
        if package is None:
            program = load_program(graph, device)
            self._largest = largest_batch(program)
            self._call = self._lowered(program, options.precision)
        else:
            self._call, self._largest = _load_package(self._name, package)
        self._places: dict[int, _Place | _FixedPlace] = {}

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph once. Raises EngineError where the inputs break the specs or the graph fails."""
        batch = check_arrays(inputs, self.inputs, self._name)
        if batch > self._largest:
            raise EngineError(f"{self._name}: a batch of {batch} is larger than its program's largest, {self._largest}")
        with self._lock, _threads(self._threads), _exact(), torch.inference_mode():
            if self._call is None:
                raise EngineError(f"{self._name}: the engine is closed")
            try:
                outputs = self._place(batch).run(inputs, batch)
            except Exception as error:  # what compiled code raises has no class of its own
                kind = kind_of(f"{type(error).__name__}: {error}")
                raise kind(f"{self._name}: {error}") from error
        if check_arrays(outputs, self.outputs, f"{self._name} gave a wrong output") != batch:
            raise EngineError(f"{self._name}: its outputs have another batch size than its inputs")
        return outputs

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
        lowered = _Autocast(whole, self._device, _DTYPES[precision])
        inputs = {name: send(array, self._device) for name, array in typical_inputs(self._graph, CHECKED_ROWS).items()}
        with _threads(self._threads), _exact(), torch.inference_mode():
            found = [[value.cpu().numpy() for value in call(inputs).values()] for call in (lowered, whole)]
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
            self._resident.put(_STEP_INPUT, arrays[_STEP_OUTPUT], outputs[_STEP_OUTPUT])
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
            self._inputs[_STEP_INPUT][:batch].copy_(outputs[_STEP_OUTPUT][:batch])
            self._resident.put(_STEP_INPUT, arrays[_STEP_OUTPUT], batch)
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


class _Autocast(nn.Module):
    """A program whose convolutions and matrix products compute in a lower precision; it gives float32."""

    def __init__(self, program: nn.Module, device: Device, dtype: torch.dtype) -> None:
        super().__init__()
        self.program, self.device, self.dtype = program, device, dtype

    def forward(self, inputs: Tensors) -> Tensors:
        with torch.autocast(self.device, self.dtype):
            outputs: Tensors = self.program(inputs)
        return {name: value.float() for name, value in outputs.items()}


def trace(module: nn.Module, inputs: Tensors) -> ExportedProgram:
    """The program of a module that takes and gives tensors by name, of any batch; `inputs` are an example.

    What is compiled of it takes the example's memory layout for granted, and arrays from outside are contiguous.
    """
    inputs = {name: value.contiguous() for name, value in inputs.items()}
    shapes = {name: {0: Dim.DYNAMIC} for name in inputs}
    # Without the patch a batch of one is taken for a case of its own.
    with _one_at_a_time, torch.no_grad(), symbolic_shapes.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        return torch.export.export(module, (inputs,), dynamic_shapes=(shapes,))


def runnable(program: ExportedProgram) -> nn.Module:
    """The module of a program, without torch's guards: of a memory layout they conclude that a batch is not of one.

    Names and shapes are checked by the engine, and the results at each size by the export.
    """
    return program.module(check_guards=False)


def load_program(graph: GraphSpec, device: Device) -> ExportedProgram:
    """The program of a graph, on a device.

    Raises EngineError for a file that is no program, or for one that takes or gives something else than the graph.
    """
    assert graph.program is not None
    name = graph.program.name
    try:
        with _one_at_a_time:
            program = torch.export.load(graph.program)
        _check_signature(name, "inputs", _named(program, program.graph_signature.user_inputs), graph.inputs)
        _check_signature(name, "outputs", _named(program, program.graph_signature.user_outputs), graph.outputs)
    except EngineError:
        raise
    except Exception as error:  # the library's errors share no base class
        raise EngineError(f"{name}: torch cannot load it as a program ({error})") from error
    for node in list(program.graph.nodes):  # the dtypes that it was traced with, which autocast changes
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            program.graph.erase_node(node)
    return program if device == "cpu" else move_to_device_pass(program, device)


def largest_batch(program: ExportedProgram) -> int:
    """The largest batch that a program takes."""
    return min(int(min(limits.upper, ANY_BATCH.batch_sizes[-1])) for limits in program.range_constraints.values())


def _named(program: ExportedProgram, names: Sequence[Any]) -> set[str]:
    """Names, dtypes and shapes of a program's inputs or outputs, as specs are printed."""
    values = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
    is_input = names == program.graph_signature.user_inputs
    spec = program.call_spec.in_spec if is_input else program.call_spec.out_spec
    tree = pytree.tree_unflatten([values[name] for name in names], spec)
    tensors: Tensors = tree[0][0] if is_input else tree
    return {_described(name, value) for name, value in tensors.items()}


def _described(name: str, value: Tensor) -> str:
    dims = ", ".join(str(dim) if isinstance(dim, int) else BATCH for dim in value.shape)
    return f"{name} {str(value.dtype).removeprefix('torch.')}({dims})"


def _check_signature(name: str, kind: str, found: set[str], specs: Sequence[TensorSpec]) -> None:
    if found != (wanted := {str(spec) for spec in specs}):
        has, wants = "; ".join(sorted(found - wanted)), "; ".join(sorted(wanted - found))
        raise EngineError(f"{name}: its {kind} have {has or 'nothing'} where the manifest wants {wants or 'nothing'}")


def compile_program(program: ExportedProgram, options: EngineOptions, device: Device) -> bytes:
    """The AOTInductor package of a program: machine code and weights. Takes minutes for a large network."""
    package = io.BytesIO()
    with _quiet():
        from torch._inductor import aoti_compile_and_package

        largest = largest_batch(program)
        (examples,), _ = program.example_inputs
        if options.precision != "fp32":
            program = trace(_Autocast(runnable(program), device, _DTYPES[options.precision]), examples)
        elif not all(value.is_contiguous() for value in examples.values()):  # a program written elsewhere
            program = trace(runnable(program), examples)
        settings = {
            "aot_inductor.metadata": {_LARGEST: str(largest)},
            "aot_inductor.use_runtime_constant_folding": options.precision != "fp32",  # weights are cast once, at load
            "compile_threads": options.threads or usable_cores(),
            "cpp.dynamic_threads": True,
        }
        aoti_compile_and_package(program, package_path=package, inductor_configs=settings)
    return package.getvalue()


def _load_package(name: str, package: bytes) -> tuple[Call, int]:
    """A package, and the largest batch that it takes. Raises EngineError for one that does not load."""
    try:
        with _quiet():
            from torch._inductor import aoti_load_package

            loaded = aoti_load_package(io.BytesIO(package), run_single_threaded=True)  # runs take turns
        return loaded, int(loaded.get_metadata()[_LARGEST])
    except Exception as error:  # the library's errors share no base class
        raise EngineError(f"{name}: torch cannot load its package ({error})") from error


def target(device: Device) -> str:
    """The chip that code is compiled for, as packages are keyed by it. Raises EngineError where there is none."""
    if device == "cpu":
        return f"{platform.machine()}-{_cpu_features()}"
    if not torch.cuda.is_available():
        raise EngineError(f"torch {torch.__version__} finds no CUDA device")
    return "sm" + "".join(map(str, torch.cuda.get_device_capability()))


def _cpu_features() -> str:
    """What a CPU can do, in 12 hex digits: code that is made for one does not run on any other."""
    features = [platform.processor(), torch.backends.cpu.get_cpu_capability()]
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        features += [next(line for line in lines if line.lower().startswith(("flags", "features")))]
    except (OSError, StopIteration):
        pass  # elsewhere than on Linux, its name has to do
    return hashlib.sha256("\n".join(features).encode()).hexdigest()[:12]


def send(array: Array, device: Device) -> Tensor:
    """A copy of an array on a device."""
    return torch.tensor(array, device=device)


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


@contextmanager
def _exact() -> Iterator[None]:
    """Convolve float32 as it is: cuDNN would in TF32, which keeps ten bits of it. torch has one switch for all."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the compiler's warnings of its own future to itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
