"""Calls beside the event loop: their results, what is let go of, and the end of a process in which one hangs."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import weakref
from contextvars import ContextVar

import pytest

from service.threads import Helper
from tests.service.helpers import until

pytestmark = pytest.mark.anyio

REQUEST: ContextVar[str] = ContextVar("REQUEST")


class Body:
    """What a call holds."""

    def decode(self) -> str:
        return REQUEST.get()

    def fail(self) -> None:
        raise ValueError("damaged")


async def test_calls_have_the_context_of_who_asks_and_results_of_their_own(anyio_backend: str) -> None:
    helper = Helper("helper")
    REQUEST.set("first")
    first = helper.result_of(Body().decode)
    REQUEST.set("second")
    assert await helper.result_of(Body().decode) == "second"
    assert await first == "first"
    with pytest.raises(ValueError, match="damaged"):
        await helper.result_of(Body().fail)
    helper.close()


async def test_what_failed_and_what_is_given_up_while_it_waits_is_let_go_at_once(anyio_backend: str) -> None:
    helper, busy = Helper("helper"), threading.Event()
    bodies = [Body(), Body()]
    left = [weakref.ref(body) for body in bodies]
    gc.disable()
    try:
        failed = helper.result_of(bodies[0].fail)
        await asyncio.wait([failed])
        assert isinstance(failed.exception(), ValueError)
        blocked = helper.result_of(lambda: busy.wait(20))
        helper.result_of(bodies[1].decode).cancel()
        del bodies, failed
        await until(lambda: not any(body() for body in left))
    finally:
        gc.enable()
    busy.set()
    assert await blocked
    helper.close()


def test_a_call_that_hangs_does_not_hold_up_the_end_of_the_process() -> None:
    code = """
import asyncio, threading
from service.threads import Helper

async def main():
    helper, begun = Helper("helper"), threading.Event()
    hanging = helper.result_of(lambda: begun.set() or threading.Event().wait())
    await asyncio.to_thread(begun.wait)
    hanging.cancel()
    helper.close()

asyncio.run(main())
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
