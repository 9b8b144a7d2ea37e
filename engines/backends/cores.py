"""How many cores this process may use, by Linux's cpusets, cgroups and topology where they exist."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
_SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def usable_cores() -> int:
    """Physical cores in the affinity mask, at most the container's CPU quota; at least 1.

    The machine's own count would start far too many threads in a container that may use two cores of many.
    """
    return max(1, min(_physical_cores(_allowed_cpus()), _quota(_CPU_MAX)))


class Company:
    """Who computes on the cores of this process now."""

    def __init__(self) -> None:
        """Nobody so far."""
        self._count = 0
        self._lock = Lock()

    @contextmanager
    def joined(self) -> Iterator[bool]:
        """Compute within; whether nobody else did when this began."""
        with self._lock:
            self._count += 1
            alone = self._count == 1
        try:
            yield alone
        finally:
            with self._lock:
                self._count -= 1


def _allowed_cpus() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _physical_cores(cpus: set[int]) -> int:
    try:
        return len({Path(_SIBLINGS.format(cpu)).read_text(encoding="ascii") for cpu in cpus})
    except OSError:
        return len(cpus)


def _quota(file: Path) -> int:
    """CPUs that a cgroup v2 quota allows, rounded up; "max" or no cgroup is no bound."""
    try:
        quota, period = file.read_text(encoding="ascii").split()
        return math.ceil(int(quota) / int(period))
    except (OSError, ValueError):
        return os.cpu_count() or 1
