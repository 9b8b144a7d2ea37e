"""The memory of the GPUs, read by NVIDIA's management library (nvidia-ml-py, of the extra `gpu`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """Bytes of one GPU, those that other processes use among them."""

    used_bytes: int
    total_bytes: int


ReadGpus = Callable[[], tuple[GpuMemory, ...]]


def open_gpus() -> ReadGpus | None:
    """What reads the memory of every GPU of the machine, in the driver's order.

    It reads none while the driver gives no answer. None where there is no such library, no driver or no GPU.
    """
    try:
        nvml = import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError:
        return None

    def read() -> tuple[GpuMemory, ...]:
        try:
            found = [nvml.nvmlDeviceGetMemoryInfo(handle) for handle in handles]
        except nvml.NVMLError:
            return ()
        return tuple(GpuMemory(memory.used, memory.total) for memory in found)

    return read if handles else None
