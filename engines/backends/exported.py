"""torch.export programs: traced, loaded and checked against their graph, and compiled into AOTInductor packages."""

from __future__ import annotations

import hashlib
import io
import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.passes import move_to_device_pass
from torch.fx import GraphModule
from torch.fx.experimental import _config as symbolic_shapes
from torch.utils import _pytree as pytree

from engines.backends.base import BATCH, EngineError, EngineOptions, GraphSpec, TensorSpec
from engines.backends.cores import usable_cores
from engines.plans import Precision, Profile

Device = Literal["cpu", "cuda"]
Tensors = dict[str, Tensor]
Call = Callable[[Tensors], Tensors]

ANY_BATCH = Profile((1024,), dynamic=True)
"""A package is made for every batch that its program takes, whatever sizes are asked for."""
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_LARGEST = "largest_batch"
_FOLDED, _OF_AUTOCAST = "_FOLDED_CONST", "program."
_one_at_a_time = Lock()
"""torch.export keeps what it is doing in global variables, and packages are compiled in a thread of their own."""


_EXACT = tuple(getattr(torch.ops.aten, name) for name in ("group_norm", "layer_norm", "rms_norm", "softmax"))
"""What computes in float32 in every precision; autocast sees to it on CUDA, not on a CPU."""


class Autocast(nn.Module):
    """A program whose convolutions and matrix products compute in a lower precision; it gives float32.

    Normalisations and softmax compute in float32.
    """

    def __init__(self, program: GraphModule, device: Device, dtype: torch.dtype) -> None:
        super().__init__()
        self.program, self.device, self.dtype = _with_exact_norms(program), device, dtype

    def forward(self, inputs: Tensors) -> Tensors:
        """What the program gives, in float32."""
        with torch.autocast(self.device, self.dtype):
            outputs: Tensors = self.program(inputs)
        return {name: value.float() for name, value in outputs.items()}


def _with_exact_norms(program: GraphModule) -> GraphModule:
    """The program, with float32 tensors for its normalisations and softmax; in float32 nothing changes."""
    for node in program.graph.nodes:
        if getattr(node.target, "overloadpacket", None) in _EXACT:
            with program.graph.inserting_before(node):
                whole = program.graph.call_function(torch.ops.aten.to.dtype, (node.args[0], torch.float32))
            node.replace_input_with(node.args[0], whole)
    program.recompile()
    return program


def trace(module: nn.Module, inputs: Tensors) -> ExportedProgram:
    """The program of a module that takes and gives tensors by name, of any batch; `inputs` are an example.

    What is compiled of it takes the example's memory layout for granted, and arrays from outside are contiguous.
    """
    inputs = {name: value.contiguous() for name, value in inputs.items()}
    shapes = {name: {0: Dim.DYNAMIC} for name in inputs}
    # Without the patch a batch of one is taken for a case of its own.
    with _one_at_a_time, torch.no_grad(), symbolic_shapes.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        return torch.export.export(module, (inputs,), dynamic_shapes=(shapes,))


def runnable(program: ExportedProgram) -> GraphModule:
    """The module of a program, without torch's guards: of a memory layout they conclude that a batch is not of one.

    Names and shapes are checked by the engine, and the results at each size by the export.
    """
    module: GraphModule = program.module(check_guards=False)
    return module


def load_program(graph: GraphSpec, device: Device) -> ExportedProgram:
    """The program of a graph, on a device.

    Raises EngineError for a file that is not a program, or for one that takes or gives something else than the graph.
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
    """The AOTInductor package of a program: machine code without its weights. Takes minutes for a large network.

    A library that has been loaded stays in memory and on disk until the process ends: so weights are no part of it.
    """
    package = io.BytesIO()
    with _quiet():
        from torch._inductor import aoti_compile_and_package

        largest = largest_batch(program)
        (examples,), _ = program.example_inputs
        if options.precision != "fp32":
            program = trace(Autocast(runnable(program), device, DTYPES[options.precision]), examples)
        elif not all(value.is_contiguous() for value in examples.values()):  # a program written elsewhere
            program = trace(runnable(program), examples)
        settings = {
            "aot_inductor.metadata": {_LARGEST: str(largest)},
            "aot_inductor.package_constants_in_so": False,
            "aot_inductor.use_runtime_constant_folding": options.precision != "fp32",  # weights are cast once, at load
            "compile_threads": options.threads or usable_cores(),
            "cpp.dynamic_threads": True,
        }
        aoti_compile_and_package(program, package_path=package, inductor_configs=settings)
    return package.getvalue()


def load_package(name: str, package: bytes, program: ExportedProgram) -> tuple[Call, int]:
    """A package with the weights of its program, and the largest batch that it takes.

    Raises EngineError for one that does not load, or that is of another program.
    """
    try:
        with _quiet():
            from torch._inductor import aoti_load_package

            loaded = aoti_load_package(io.BytesIO(package), run_single_threaded=True)  # runs take turns
            loaded.load_constants(_constants(program, loaded.get_constant_fqns()), check_full_update=True)
        return loaded, int(loaded.get_metadata()[_LARGEST])
    except Exception as error:  # the library's errors share no base class
        raise EngineError(f"{name}: torch cannot load its package ({error})") from error


def _constants(program: ExportedProgram, names: Sequence[str]) -> Tensors:
    """The constants of a package of a program, by their names in it; it makes those that are folded by itself."""
    known = {**program.state_dict, **program.constants}
    wanted = (name for name in names if not name.startswith(_FOLDED))
    return {name: known[name.removeprefix(_OF_AUTOCAST)] for name in wanted}


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


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the compiler's warnings of its own future to itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
