"""How many rows of a kind fit in memory, where more did not. Has no clock; time is an argument."""

from __future__ import annotations

from collections.abc import Hashable

# How long a cap that memory forced is kept: what else took the memory may be gone.
_CAP_S = 60.0


class Caps:
    """The most rows of each group that may go at once, for as long as that is remembered."""

    def __init__(self) -> None:
        self._caps: dict[Hashable, tuple[int, float]] = {}

    def lower(self, group: Hashable, rows: int, now: float) -> None:
        """Learn that so many rows of ``group`` do not fit: for a while half of them may go at once, or fewer."""
        self._caps[group] = self.of(group, max(1, rows // 2), now), now + _CAP_S

    def of(self, group: Hashable, most: int, now: float) -> int:
        """How many of ``most`` rows of ``group`` may go at once."""
        rows, until = self._caps.get(group, (most, now))
        if now >= until:
            self._caps.pop(group, None)
            return most
        return min(rows, most)
