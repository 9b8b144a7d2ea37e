"""The CUDA runtime as far as an engine needs it: memory, one stream, graphs. Every failure is an EngineError."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from typing import Any

from engines.backends.base import Array, EngineError
from engines.backends.faults import kind_of

Pointer = int

_NON_BLOCKING = 1
"""cudaStreamNonBlocking."""


class Captured:
    """Launches that were captured from a stream: every call puts all of them there again."""

    def __init__(self, launch: Callable[[], object], destroy: Callable[[], object]) -> None:
        self._launch, self._destroy = launch, destroy

    def __call__(self) -> None:
        """Launch all that was captured."""
        self._launch()

    def close(self) -> None:
        """Give the graph back, once; nothing may be launched afterwards."""
        self._destroy()


class Cuda:
    """The first CUDA device, by NVIDIA's own bindings. Its stream is made when it is first needed."""

    def __init__(self) -> None:
        """Find the device. Raises EngineError without the bindings, a driver or a device."""
        try:
            self._runtime = import_module("cuda.bindings.runtime")
        except ImportError as error:
            raise EngineError(f"the CUDA bindings are not installed ({error}): pip install cuda-bindings") from error
        if self._call("cudaGetDeviceCount") < 1:
            raise EngineError("there is no CUDA device")
        self._made: Any = None

    @property
    def target(self) -> str:
        """The chip, as plans are named by it: sm89."""
        attributes = self._runtime.cudaDeviceAttr
        names = ("cudaDevAttrComputeCapabilityMajor", "cudaDevAttrComputeCapabilityMinor")
        return "sm" + "".join(str(self._call("cudaDeviceGetAttribute", getattr(attributes, name), 0)) for name in names)

    @property
    def name(self) -> str:
        """What its maker calls it."""
        raw = self._call("cudaGetDeviceProperties", 0).name
        return (raw.decode() if isinstance(raw, bytes) else str(raw)).rstrip("\0")

    @property
    def used_bytes(self) -> int:
        """Memory of the device that is taken now, by whomever."""
        free, total = self._call("cudaMemGetInfo")
        return int(total - free)

    @property
    def stream(self) -> int:
        """The stream on which all is done in order."""
        return int(self._stream)

    def close(self) -> None:
        """Give the stream back, if there is one."""
        stream, self._made = self._made, None
        if stream is not None:
            self._call("cudaStreamDestroy", stream)

    def allocate(self, size: int) -> Pointer:
        """Device memory of so many bytes. Raises DeviceMemoryError where there is none left."""
        return int(self._call("cudaMalloc", size))

    def free(self, pointer: Pointer) -> None:
        """Give memory back."""
        self._call("cudaFree", pointer)

    def upload(self, pointer: Pointer, array: Array) -> None:
        """Copy a contiguous array to the device."""
        self._copy(pointer, array.ctypes.data, array.nbytes, "cudaMemcpyHostToDevice")

    def download(self, array: Array, pointer: Pointer) -> None:
        """Copy from the device into a contiguous array; it is there after `synchronize`."""
        self._copy(array.ctypes.data, pointer, array.nbytes, "cudaMemcpyDeviceToHost")

    def move(self, target: Pointer, source: Pointer, size: int) -> None:
        """Copy bytes on the device."""
        self._copy(target, source, size, "cudaMemcpyDeviceToDevice")

    def synchronize(self) -> None:
        """Wait until all is done. Raises EngineError for what failed on the way."""
        self._call("cudaStreamSynchronize", self._stream)

    def capture(self, launch: Callable[[], None]) -> Captured:
        """What launches again, in one call, all that `launch` puts on the stream. Whoever asks for it closes it."""
        modes = self._runtime.cudaStreamCaptureMode
        with ExitStack() as closing:
            self._call("cudaStreamBeginCapture", self._stream, modes.cudaStreamCaptureModeThreadLocal)
            try:
                launch()
            finally:
                graph = self._call("cudaStreamEndCapture", self._stream)
                closing.callback(self._call, "cudaGraphDestroy", graph)
            executable = self._call("cudaGraphInstantiate", graph, 0)
        return Captured(
            partial(self._call, "cudaGraphLaunch", executable, self._stream),
            partial(self._call, "cudaGraphExecDestroy", executable),
        )

    @property
    def _stream(self) -> Any:
        if self._made is None:
            # One that waits for nobody: others could not use the default stream while this one is captured.
            self._made = self._call("cudaStreamCreateWithFlags", _NON_BLOCKING)
        return self._made

    def _copy(self, target: int, source: int, size: int, kind: str) -> None:
        kinds = self._runtime.cudaMemcpyKind
        self._call("cudaMemcpyAsync", target, source, size, getattr(kinds, kind), self._stream)

    def _call(self, name: str, *arguments: Any) -> Any:
        status, *values = getattr(self._runtime, name)(*arguments)
        if int(status) != 0:
            message = f"CUDA: {name} failed with {getattr(status, 'name', status)}"
            raise kind_of(message)(message)
        return values[0] if len(values) == 1 else tuple(values) or None
