"""Encoded prompts, kept for the next request that has the same one. Least recently used go first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from threading import Lock

from engines.backends.base import Array

MAX_BYTES = 64 * 1024 * 1024

Condition = dict[str, Array]


class ConditionCache:
    """At most ``max_bytes`` of arrays by prompt, of one bundle. Its methods may be called from several threads."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        """Hold nothing yet."""
        self._max_bytes = max_bytes
        self._bytes = 0
        self._kept: OrderedDict[str, Condition] = OrderedDict()
        self._lock = Lock()

    def __contains__(self, prompt: str) -> bool:
        return prompt in self._kept

    def get(self, prompt: str) -> Condition | None:
        """The arrays of a prompt, which nobody may write to; None where they are not kept."""
        with self._lock:
            condition = self._kept.get(prompt)
            if condition is not None:
                self._kept.move_to_end(prompt)
            return condition

    def put(self, prompt: str, condition: Condition) -> None:
        """Keep the arrays of a prompt, in place of those that were used the longest time ago."""
        for array in condition.values():
            array.flags.writeable = False
        size = _bytes_of(condition)
        with self._lock:
            if prompt in self._kept or size > self._max_bytes:
                return
            self._kept[prompt] = condition
            self._bytes += size
            while self._bytes > self._max_bytes:
                self._bytes -= _bytes_of(self._kept.popitem(last=False)[1])


def _bytes_of(condition: Mapping[str, Array]) -> int:
    return sum(array.nbytes for array in condition.values())
