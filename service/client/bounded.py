"""Work that must not take longer than it may, for code that blocks. Knows nothing of HTTP."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from threading import Thread
from typing import TypeVar

from service.client.errors import TimeLimitPassed

T = TypeVar("T")


def within(limit_s: float, work: Callable[[], T]) -> T:
    """What ``work`` gives or raises, if it ends in time. Raises TimeLimitPassed.

    It runs in a thread of its own, since no time limit of a socket bounds more than one read. A thread that is late
    is left behind and does not keep the process from ending.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    Thread(target=copy_context().run, args=(run,), name="client", daemon=True).start()
    try:
        return outcome.result(limit_s)
    except TimeoutError as error:
        raise TimeLimitPassed from error
