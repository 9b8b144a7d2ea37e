"""What a device says decides what is done: smaller batches, a new process, or one failure."""

from __future__ import annotations

import pytest

from engines.backends.base import DeviceLostError, DeviceMemoryError, EngineError
from engines.backends.faults import kind_of


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("CUDA: cudaMalloc failed with cudaErrorMemoryAllocation", DeviceMemoryError),
        ("BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer", DeviceMemoryError),
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", DeviceMemoryError),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes", DeviceMemoryError),
        ("RuntimeError: CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED", DeviceMemoryError),
        ("CUDNN failure 4: CUDNN_STATUS_ALLOC_FAILED", DeviceMemoryError),
        ("RuntimeException: std::bad_alloc", DeviceMemoryError),
        ("_ArrayMemoryError: Unable to allocate 1.00 GiB for an array", DeviceMemoryError),
        ("MemoryError: ", DeviceMemoryError),
        ("CUDA: cudaStreamSynchronize failed with cudaErrorIllegalAddress", DeviceLostError),
        ("CUDA failure 700: an illegal memory access was encountered", DeviceLostError),
        ("AcceleratorError: CUDA error: device-side assert triggered", DeviceLostError),
        ("CUDA: cudaGraphLaunch failed with cudaErrorLaunchFailure", DeviceLostError),
        ("CUDA: cudaMemcpyAsync failed with cudaErrorECCUncorrectable", DeviceLostError),
        ("CUDA: cudaMemcpyAsync failed with cudaErrorInvalidValue", EngineError),
        ("Got invalid dimensions for input: z", EngineError),
    ],
)
def test_the_kind_of_a_failure(message: str, kind: type[EngineError]) -> None:
    assert kind_of(message) is kind
