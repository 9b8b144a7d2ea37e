"""uvicorn with manners: on SIGTERM it goes on answering until what is in flight is done."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import sys
import time
from functools import partial
from types import FrameType
from typing import NoReturn, cast

import uvicorn

from service.app import create_app
from service.connections import BACKLOG, Connection, bound_connections
from service.runtime import Service, State
from service.security.cross_origin import is_loopback
from service.settings import Settings

logger = logging.getLogger(__name__)

LOST = 70
"""The exit code of a process whose device runs nothing any more, and would in another."""


class Server(uvicorn.Server):
    """One process that serves one app.

    The first SIGTERM, SIGINT or SIGHUP starts draining: /readyz and requests for images get 503 while those in flight
    are finished, for at most ``drain_timeout_s``; then it exits. A second signal gives up what is in flight.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._drain_since: float | None = None
        self.failed = False
        self.lost = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain on the first signal, exit on the second, by force on the third."""
        if self._drain_since is None:
            self._drain_since = time.monotonic()
            self._service.drain()
        else:
            self.force_exit = self.should_exit
            self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second: exit once drained, or where the service cannot go on."""
        self._service.watch()
        self.lost = self.lost or self._service.worker_lost
        self.failed = self.failed or self._service.state is State.FAILED
        if self.failed or self.should_exit or self._drained():
            self._service.abandon()
            self.should_exit = True
        return await super().on_tick(counter)

    def _drained(self) -> bool:
        if self._drain_since is None:
            return False
        waited_s = time.monotonic() - self._drain_since
        return self._service.drained() or waited_s > self._service.settings.drain_timeout_s


def run(settings: Settings) -> int:
    """Serve until a signal. Returns the exit code: 0, `LOST`, or 1 where the service could not start."""
    app = create_app(settings, local=is_loopback(settings.host))
    # Over h11, as it bounds the headers of a request, which httptools does not.
    connection = partial(
        Connection,
        metrics=app.state.service.metrics,
        max_connections=bound_connections(settings.max_inflight),
        timeout_s=settings.body_timeout_s,
    )
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        http=cast(type[asyncio.Protocol], connection),
        ws="none",
        backlog=BACKLOG,
        timeout_keep_alive=math.ceil(settings.body_timeout_s),
        timeout_graceful_shutdown=5,
    )
    server = Server(config, app.state.service)
    # A terminal that is closed sends it; uvicorn handles the others.
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, server.handle_exit)
    try:
        server.run()
    except SystemExit:  # uvicorn's, where it cannot have the address
        return 1
    if server.lost:
        return LOST
    return 1 if server.failed else 0


def start_anew() -> NoReturn:
    """Put a new process in the place of this one, by the same command and with the same number.

    A device that fails for good fails it when it loads its bundle, and it exits.
    """
    logger.warning("starting anew")
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
