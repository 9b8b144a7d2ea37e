"""Bisection: one bad item must not fail its whole batch. Knows nothing of what the items are."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Generic, TypeVar

from engines.backends.base import DeviceLostError, DeviceMemoryError
from engines.pipeline import TaskError
from service.batching.caps import Caps
from service.jobs import Failed

Item = TypeVar("Item")
Result = TypeVar("Result")

BROKEN = Failed("engine", "the engine failed", retryable=True)
_NO_MEMORY = Failed("engine", "the device has no memory left for this image", retryable=True)
_AT_FAULT = Failed("engine", "the engine failed on this request, and on no other of its batch")


def isolate(
    call: Callable[[Sequence[Item]], Sequence[Result]],
    items: Sequence[Item],
    on_failure: Callable[[Exception, Sequence[Item]], None],
) -> list[Result | Exception]:
    """The result of ``call`` for every item, or the exception that the item causes on its own.

    A failing batch is halved until only the bad items fail: b bad ones among n cost about 2 b log2(n) more
    calls. ``call`` must leave its items as they were where it raises. ``on_failure`` sees each failed batch.
    On a device that is lost everything fails: there is nothing to halve for.
    """
    if not items:
        return []
    try:
        return list(call(items))
    except Exception as error:
        on_failure(error, items)
        if len(items) == 1 or isinstance(error, DeviceLostError):
            return [error] * len(items)
    middle = len(items) // 2
    return isolate(call, items[:middle], on_failure) + isolate(call, items[middle:], on_failure)


class Isolator(Generic[Item]):
    """`isolate`, of no more at once than fit in memory as far as ``caps`` know, which learn of what did not fit."""

    def __init__(
        self, on_failure: Callable[[Exception, Sequence[Item]], None], clock: Callable[[], float], caps: Caps
    ) -> None:
        self._on_failure = on_failure
        self._clock = clock
        self._caps = caps

    def run(
        self, group: Hashable, call: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item]
    ) -> list[Result | Exception]:
        """The result of ``call`` for every item, all of which are of ``group``, or the exception that it causes."""
        results: list[Result | Exception] = []
        while left := items[len(results) :]:
            most = self._caps.of(group, len(left), self._clock())
            results += isolate(call, left[:most], partial(self._failed, group))
        return results

    def _failed(self, group: Hashable, error: Exception, items: Sequence[Item]) -> None:
        if isinstance(error, DeviceMemoryError) and len(items) > 1:
            self._caps.lower(group, len(items), self._clock())
        self._on_failure(error, items)


def failures(results: Sequence[object]) -> list[Failed | None]:
    """What to tell the client of each result of `isolate`; None where it succeeded.

    Where others of the batch succeeded, the item is at fault and trying again is vain; where none did, the
    engine may be.
    """
    spread = all(isinstance(result, Exception) for result in results)
    return [_failure(result, spread) if isinstance(result, Exception) else None for result in results]


def _failure(error: Exception, spread: bool) -> Failed:
    if isinstance(error, TaskError):
        return Failed("invalid", error.message, error.code, error.param)
    if isinstance(error, DeviceMemoryError):
        return _NO_MEMORY
    if isinstance(error, DeviceLostError):
        return BROKEN
    return BROKEN if spread else _AT_FAULT
