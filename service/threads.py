"""Calls in a thread of their own, one after another. Nobody has to wait for one that hangs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextvars import copy_context
from queue import SimpleQueue
from typing import TypeVar

Result = TypeVar("Result")


def uncancellable() -> Future[Result]:
    """A future of which one who waits and gives up does not cancel it for the others: it counts as running."""
    future: Future[Result] = Future()
    future.set_running_or_notify_cancel()
    return future


def finished() -> Future[None]:
    """A future of what is done already."""
    future: Future[None] = Future()
    future.set_result(None)
    return future


def finish_after(waits: Sequence[Future[None]], then: Future[None]) -> None:
    """Have ``then`` done once all of these are."""
    if waits:
        waits[0].add_done_callback(lambda _: finish_after(waits[1:], then))
    else:
        then.set_result(None)


class Helper:
    """A thread for calls, begun with the first of them.

    That of an executor is waited for when the process exits, for as long as its call takes: a decoder that hangs would
    hold up the process that replaces this one.
    """

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._given = self._done = 0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether its thread was begun and did not end yet."""
        return self._thread.is_alive()

    @property
    def progress(self) -> int | None:
        """A number that stands still where the call that runs does not end; None where there is nothing to do."""
        return self._done if self._given > self._done else None

    def result_of(self, call: Callable[[], Result]) -> asyncio.Future[Result]:
        """The call's result, for the event loop that runs."""
        return asyncio.wrap_future(self.submit(call))

    def submit(self, call: Callable[[], Result]) -> Future[Result]:
        """The call's result. Where it is given up while it waits, what it holds (a whole body) is let go at once."""
        if self._thread.ident is None:
            self._thread.start()
        result: Future[Result] = Future()
        future, calls = result, [call]
        future.add_done_callback(lambda _: calls.clear())
        # In the context of the request, whose id its log lines have there too.
        within = copy_context().run

        def run() -> None:
            nonlocal future
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(within(calls.pop()))
                except BaseException as error:
                    future.set_exception(error)
            del future  # Which the traceback of its own exception would keep, with all that the call had.

        self._given += 1
        self._calls.put(run)
        return result

    def close(self, wait_s: float = 0.0) -> bool:
        """End the thread after what it is at and what waits for it. Whether it ended: no call may take ``wait_s``."""
        self._calls.put(None)
        done = None
        while self._thread.is_alive() and done != self._done:
            done = self._done
            self._thread.join(wait_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            self._done += 1
            del call
