"""How many cores this process may use, by Linux's cpusets, cgroups and topology where they exist."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

_ROOT = Path("/")
_QUOTAS = (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
"""The files that have the quota and its period: of cgroups version 2, and of version 1."""
_SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def usable_cores() -> int:
    """Physical cores in the affinity mask, at most the container's CPU quota; at least 1.

    The machine's own count would start far too many threads in a container that may use two cores of many.
    """
    return max(1, math.ceil(min(_physical_cores(_allowed_cpus()), _quota())))


class Company:
    """Counts what computes in this process now."""

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


def _quota() -> float:
    """CPUs that the quotas of this process's cgroups allow, the least of them; no quota is no bound."""
    return min((cpus for folder in _cgroups() for cpus in _quotas(folder)), default=math.inf)


def _cgroups() -> Iterator[Path]:
    """The cgroups of this process that may bound its CPUs, of either version, and those that they are in.

    Those of which a container shows no folder are bounded, for it, by the one that it shows as the root.
    """
    try:
        lines = (_ROOT / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for name in ("cpu", "cpu,cpuacct") if controllers else ("",):  # version 2 names no controllers
            mount = _ROOT / "sys/fs/cgroup" / name
            own = mount / path.lstrip("/")
            yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(mount))


def _quotas(folder: Path) -> Iterator[float]:
    """The quota of a cgroup, where it has one, in CPUs."""
    for names in _QUOTAS:
        try:
            words = " ".join((folder / name).read_text(encoding="ascii") for name in names).split()
            quota, period = map(int, words)
        except (OSError, ValueError):  # "max" is no bound
            continue
        if quota > 0:  # nor is -1
            yield quota / period
