"""Deficit round robin: who gets the worker next, so that all get as much of it. Knows nothing of time or of rows."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

# The most that an urgent group may be ahead of its share, in ticks of the dearest group.
_LOAN = 4.0


class Shares:
    """Groups in a ring, each with a credit. The first is served while its credit lasts, then waits behind the others.

    So over any time groups that always have work are served the same cost, within a few ticks of the dearest one. A
    group that has nothing to do keeps neither credit nor debt.
    """

    def __init__(self) -> None:
        """Know no group yet."""
        self._credit: dict[Hashable, float] = {}

    def next(self, costs: Mapping[Hashable, float], urgent: Hashable | None = None) -> Hashable:
        """The group to serve, and charge it; ``costs`` has what the next tick of every group with work costs.

        An ``urgent`` group is served out of turn, on credit, until it is too far ahead of the others.
        """
        quantum = max(costs.values())
        self._credit = {group: credit for group, credit in self._credit.items() if group in costs}
        for group in costs:
            self._credit.setdefault(group, quantum)
        if urgent is None or self._credit[urgent] - costs[urgent] < -_LOAN * quantum:
            urgent = self._in_turn(costs, quantum)
        self._credit[urgent] -= costs[urgent]
        return urgent

    def _in_turn(self, costs: Mapping[Hashable, float], quantum: float) -> Hashable:
        while self._credit[group := next(iter(self._credit))] < costs[group]:
            self._credit[group] = min(self._credit.pop(group) + quantum, 2 * quantum)
        return group
