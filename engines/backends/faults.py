"""What a device's error messages mean: no memory, a device that is lost, or an ordinary failure."""

from __future__ import annotations

from engines.backends.base import DeviceLostError, DeviceMemoryError, EngineError

_NO_MEMORY = (
    "out of memory",
    "failed to allocate",
    "bfcarena",
    "memoryallocation",
    "outofmemory",
    "can't allocate memory",
    "unable to allocate",
    "alloc_failed",
    "allocation_failed",
    "bad_alloc",
    "memoryerror",
)
# Errors of CUDA after which every later call of the process fails too, as its runtime names and describes them.
_LOST = (
    *("illegaladdress", "illegal memory access", "illegalinstruction", "illegal instruction"),
    *("misalignedaddress", "misaligned address", "invalidaddressspace", "invalidpc", "hardwarestackerror"),
    *("launchfailure", "unspecified launch failure", "launchtimeout", "launch timed out", "contextisdestroyed"),
    *("cudaerrorassert", "device-side assert", "eccuncorrectable", "uncorrectable ecc", "nvlinkuncorrectable"),
)


def kind_of(message: str) -> type[EngineError]:
    """The error to raise for a failure that a library describes so."""
    text = message.lower()
    if any(sign in text for sign in _LOST):
        return DeviceLostError
    return DeviceMemoryError if any(sign in text for sign in _NO_MEMORY) else EngineError


def failure(what: str, error: Exception) -> EngineError:
    """What to raise for an error of a library whose errors share no base class; ``what`` opens its message."""
    return kind_of(f"{type(error).__name__}: {error}")(f"{what}: {error}")
