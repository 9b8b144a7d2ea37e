"""A made-up CUDA device and TensorRT: memory in the host's, plans that ONNX Runtime runs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from engines.backends.base import Array, DeviceMemoryError, EngineError, TensorSpec
from engines.backends.cuda import Captured
from engines.backends.trt_library import Library, Progress
from engines.plans import Profile


class MadeUpCuda:
    """A device whose memory is the host's, and whose stream does at once what it is given."""

    target = "sm89"
    STREAM = 7

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.uploads = 0
        self.captured = 0
        self.open = 0
        """Streams and captured launches that were not given back."""
        self.limit = 1 << 40

    @property
    def stream(self) -> int:
        self.open = self.open or 1
        return self.STREAM

    def close(self) -> None:
        self.open -= 1

    def allocate(self, size: int) -> int:
        if size > self.limit:
            raise DeviceMemoryError("CUDA: cudaMalloc failed with cudaErrorMemoryAllocation")
        block = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def free(self, pointer: int) -> None:
        del self.memory[pointer]

    def upload(self, pointer: int, array: Array) -> None:
        self.uploads += 1
        self.move(pointer, array.ctypes.data, array.nbytes)

    def download(self, array: Array, pointer: int) -> None:
        self.move(array.ctypes.data, pointer, array.nbytes)

    def move(self, target: int, source: int, size: int) -> None:
        ctypes.memmove(target, source, size)

    def synchronize(self) -> None:
        pass

    def capture(self, launch: Callable[[], None]) -> Captured:
        self.captured += 1
        self.open += 1
        return Captured(launch, self.close)


class MadeUpContext:
    """Runs the plan, an ONNX graph, on what lies at the addresses it was given."""

    def __init__(self, session: ort.InferenceSession, logger: Any) -> None:
        self.logger = logger
        self.session, self.shapes, self.addresses = session, dict[str, Any](), dict[str, int]()

    def set_optimization_profile_async(self, place: int, stream: int) -> bool:
        assert stream == MadeUpCuda.STREAM
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return stream == MadeUpCuda.STREAM

    def execute_async_v3(self, stream: int) -> bool:
        feeds = {}
        for node in self.session.get_inputs():
            dtype = np.float32 if node.type == "tensor(float)" else np.int64
            size = int(np.prod(self.shapes[node.name])) * np.dtype(dtype).itemsize
            raw = ctypes.string_at(self.addresses[node.name], size)
            feeds[node.name] = np.frombuffer(raw, dtype).reshape(self.shapes[node.name])
        names = [node.name for node in self.session.get_outputs()]
        for name, array in zip(names, self.session.run(names, feeds), strict=True):
            ctypes.memmove(self.addresses[name], np.ascontiguousarray(array).ctypes.data, array.nbytes)
        return True


class MadeUpConfig:
    strategy = dynamic_shapes_kernel_specialization_strategy = ""

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy


class MadeUpEngine:
    def __init__(self, plan: bytes, logger: Any) -> None:
        self.logger = logger
        self.session = ort.InferenceSession(plan, providers=["CPUExecutionProvider"])
        nodes = [*self.session.get_inputs(), *self.session.get_outputs()]
        self.nodes = {node.name: node for node in nodes}
        self.num_io_tensors = len(self.nodes)

    def get_tensor_name(self, i: int) -> str:
        return list(self.nodes)[i]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(dim if isinstance(dim, int) else -1 for dim in self.nodes[name].shape)

    def get_tensor_dtype(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name={"tensor(float)": "FLOAT", "tensor(int64)": "INT64"}[self.nodes[name].type])

    def create_runtime_config(self) -> MadeUpConfig:
        return MadeUpConfig()

    def create_execution_context(self, config: MadeUpConfig) -> MadeUpContext:
        assert config.strategy == "room for the profile"
        assert config.dynamic_shapes_kernel_specialization_strategy == "at once"
        return MadeUpContext(self.session, self.logger)


class MadeUpRuntime:
    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, plan: bytes) -> MadeUpEngine | None:
        if plan == b"of another version":
            self.logger.log(1, "the plan was built by version 9")
            return None
        return MadeUpEngine(plan, self.logger)


class MadeUpLogger:
    ERROR = 1


MADE_UP = SimpleNamespace(
    __name__="made_up_rtx",
    __version__="1.0",
    ILogger=type("ILogger", (MadeUpLogger,), {}),
    Runtime=MadeUpRuntime,
    ExecutionContextAllocationStrategy=SimpleNamespace(ON_PROFILE_CHANGE="room for the profile"),
    DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER="at once"),
    ComputeCapability=SimpleNamespace(__members__={"CURRENT": 1, "SM120": 120, "SM89": 89}),
)


def build_nothing(
    library: Library,
    graph: Path,
    inputs: Sequence[TensorSpec],
    profile: Profile,
    target: str,
    progress: Progress,
    name: str,
) -> bytes:
    """The graph as the plan, after one step."""
    if not progress("building", 1, 1):
        raise EngineError("the build was ended")
    return onnx.load(graph).SerializeToString()
