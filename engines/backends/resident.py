"""Which arrays of the host lie on a device already: what did not change between two ticks is not sent again."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np

from engines.backends.base import Array

_Value = TypeVar("_Value")


def _is_fixed(array: Array) -> bool:
    """Whether nobody can write to an array, nor to any that it is a view of."""
    seen: object = array
    while isinstance(seen, np.ndarray):
        if seen.flags.writeable:
            return False
        seen = seen.base
    return True


class Resident(Generic[_Value]):
    """Values on a device by the host array that they are a copy of, the last one of each name.

    An array is known by its identity, so only arrays that nobody can write to are remembered: neither to them nor to
    what they are views of.
    """

    def __init__(self) -> None:
        """Remember nothing yet."""
        self._values: dict[str, tuple[weakref.ref[Array], _Value]] = {}

    def get(self, name: str, array: Array, send: Callable[[Array], _Value]) -> _Value:
        """The copy of `array` under `name`, sent to the device if it is not there."""
        known = self._values.get(name)
        if known is not None and known[0]() is array:
            return known[1]
        value = send(array)
        self.put(name, array, value)
        return value

    def put(self, name: str, array: Array, value: _Value) -> None:
        """Note that `value` is the device's copy of `array`; the earlier one of that name is let go."""
        self._values.pop(name, None)
        if _is_fixed(array):
            self._values[name] = (weakref.ref(array), value)

    def clear(self) -> None:
        """Let all of them go."""
        self._values.clear()
