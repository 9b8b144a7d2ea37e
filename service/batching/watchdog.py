"""Tells a worker that hangs from one that is slow, and from one that was stopped with its whole process."""

from __future__ import annotations

# A gap between two looks is that of a process which did not run: a suspended machine is no sign of a worker that hangs.
_LONGEST_GAP_S = 1.0


class Watchdog:
    """Looks at how far a worker has come, several times a second."""

    def __init__(self, limit_s: float) -> None:
        """A worker that has not got on for ``limit_s`` hangs."""
        self._limit_s = limit_s
        self._seen: int | None = None
        self._last = 0.0
        self._silent_s = 0.0

    def barks(self, progress: int | None, now: float) -> bool:
        """Whether ``progress``, any number that changes when the worker gets on, has been the same for too long.

        None is that of one that has nothing to do.
        """
        if progress is None or progress != self._seen:
            self._seen, self._silent_s = progress, 0.0
        else:
            self._silent_s += min(now - self._last, _LONGEST_GAP_S)
        self._last = now
        return self._silent_s > self._limit_s
