"""Memory that was freed, given back to the machine."""

from __future__ import annotations

import ctypes


def trim() -> None:
    """Have the C library return what it keeps for later allocations: the weights of a bundle that was closed.

    Only glibc keeps so much, and only there is there anything to do.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
