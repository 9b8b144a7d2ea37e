"""How long a tick takes: a rows + b, fitted to the ticks that ran. Pure arithmetic, bounded and never negative."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

Line = tuple[float, float]
Point = tuple[float, float, float]
"""Rows, seconds, weight."""

# The weight of a tick falls to a half within about 35 later ones.
_KEPT = 0.98
# A tick that took longer than this many times what was expected counts as that: a stall is not a new speed.
_SURPRISE = 3.0
_SMOOTHING = 0.3
_FEW = 3
_MEASURED_WITHIN_TICKS = 500
_DOUBT = 0.9
_SHORTEST_S = 1e-6


class Latency:
    """Seconds of a tick of one group by its number of rows.

    The line a rows + b comes from the warm-up and follows the ticks since, by least squares that forget exponentially.
    Where the same number of rows ran lately, what was measured stands in for the line: engines of fixed shapes pad, and
    their times are stairs.
    """

    def __init__(self, expected_s_per_row: float, seconds_by_rows: Mapping[int, float] | None = None) -> None:
        """Start from the ticks of a warm-up, or from an expectation that the first tick overrides."""
        warm = [(float(rows), seconds, 1.0) for rows, seconds in (seconds_by_rows or {}).items()]
        self._start = _least_squares(warm) if warm else (expected_s_per_row, 0.0)
        self._line: Line | None = self._start
        self._largest = max([1.0, *(rows for rows, _, _ in warm)])
        self._sums = [0.0] * 6
        self._measured = {rows: (seconds, 0) for rows, seconds in (seconds_by_rows or {}).items()}
        self._runs: dict[int, deque[float]] = {}
        self._ticks = 0
        self._doubted = False

    @property
    def known(self) -> bool:
        """Whether any tick was measured."""
        return bool(self._measured)

    @property
    def line(self) -> Line:
        """a in seconds a row, and b in seconds: fitted when it is asked for, which is seldom."""
        if self._line is None:
            self._line = self._fit()
        return self._line

    @property
    def sizes(self) -> list[int]:
        """The numbers of rows that were measured lately."""
        return [rows for rows, (_, tick) in self._measured.items() if self._ticks - tick <= _MEASURED_WITHIN_TICKS]

    def seconds(self, rows: int) -> float:
        """What a tick of so many rows is expected to take."""
        measured = self._measured.get(rows)
        if measured is not None and self._ticks - measured[1] <= _MEASURED_WITHIN_TICKS:
            return measured[0]
        return self._on_line(rows)

    def surely_s(self, rows: int) -> float | None:
        """What a tick of so many rows takes at the least, by its last few; None where it hardly ever ran."""
        runs = self._runs.get(rows, ())
        return min(runs) if len(runs) >= _FEW else None

    def observe(self, rows: int, seconds: float) -> None:
        """Note that a tick of so many rows took so long."""
        expected = self.seconds(rows)
        if self.known:
            seconds = min(seconds, _SURPRISE * expected)
        seconds = max(seconds, _SHORTEST_S)
        before = expected if rows in self._measured else seconds
        self._ticks += 1
        self._runs.setdefault(rows, deque(maxlen=2 * _FEW)).append(seconds)
        self._measured[rows] = before + _SMOOTHING * (seconds - before), self._ticks
        self._doubted = False
        self._follow(float(rows), seconds)

    def doubt(self) -> None:
        """Note that work was given up because of what is expected here.

        Where that happens again before another tick could correct it, expect less: else a wrong expectation would let
        nothing run, and last.
        """
        if self._doubted:
            a, b = self.line
            self._line = _DOUBT * a, _DOUBT * b
            self._measured = {rows: (_DOUBT * seconds, tick) for rows, (seconds, tick) in self._measured.items()}
        self._doubted = True

    def _on_line(self, rows: int) -> float:
        a, b = self.line
        return max(a * rows + b, _SHORTEST_S)

    def _follow(self, rows: float, seconds: float) -> None:
        a, b = self._start
        self._largest = max(self._largest, rows)
        new = (1.0, rows, seconds, rows * rows, rows * seconds, a * rows + b)
        self._sums = [_KEPT * old + added for old, added in zip(self._sums, new, strict=True)]
        self._line = None

    def _fit(self) -> Line:
        """The line through the ticks so far, and the line of the start, moved to the speed of the ticks so far.

        The start holds the line's slope where all ticks are alike, and counts for little where they are not.
        """
        a, b = self._start
        speed = self._sums[2] / self._sums[5]
        ends = (1.0, self._largest)
        return _least_squares([(x, speed * (a * x + b), 0.1) for x in ends], self._sums)


def _least_squares(points: Sequence[Point], sums: Sequence[float] = (0.0,) * 5) -> Line:
    """The line of least squares with neither a nor b negative, through ``points`` and what the ``sums`` are of.

    The sums are of weights, of rows, of seconds, of rows squared and of rows x seconds.
    """
    weight = sums[0] + sum(w for _, _, w in points)
    x = sums[1] + sum(w * rows for rows, _, w in points)
    y = sums[2] + sum(w * seconds for _, seconds, w in points)
    xx = sums[3] + sum(w * rows * rows for rows, _, w in points)
    xy = sums[4] + sum(w * rows * seconds for rows, seconds, w in points)
    spread = xx - x * x / weight
    if spread <= 1e-9 * xx:  # one number of rows says nothing of b
        return y / x, 0.0
    a = (xy - x * y / weight) / spread
    b = (y - a * x) / weight
    if a < 0:
        return 0.0, y / weight
    return (xy / xx, 0.0) if b < 0 else (a, b)
