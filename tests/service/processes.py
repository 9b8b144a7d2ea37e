"""Processes of the service, as production has them, started and killed by tests and benchmarks."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from tests.service.helpers import wait_until
from tests.service.redis_server import RedisServer


class Process:
    """One process of the service, whose ticks take ``tick_s`` longer.

    ``prefix`` is a command that starts another, and ``environment`` comes beside the settings.
    """

    def __init__(
        self,
        role: str,
        bundle: Path,
        redis: RedisServer,
        tick_s: float = 0.0,
        *,
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        values = {
            "role": role,
            "queue": redis.url,
            "bundle": bundle,
            "backend": "fake",
            "port": 0,
            "reclaim_after_s": 1,
        }
        named = {f"FEWSTEP_{name.upper()}": f"{value}" for name, value in (values | settings).items()}
        self.lines: list[dict[str, Any]] = []
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "tests.service.slow_service", f"{tick_s}"],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {}), **named},
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr is not None
        self.lines.extend(json.loads(line) for line in self._process.stderr)

    @property
    def url(self) -> str:
        found = [re.search(r"running on (http://\S+)", line["event"], re.I) for line in self.lines]
        return next((match.group(1) for match in reversed(found) if match), "")

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=60)

    def ready(self) -> bool:
        assert self.alive, self.lines
        return bool(self.url) and self.get("/readyz").status_code == 200

    def metric(self, name: str) -> float:
        found = re.search(rf"^{name} (\S+)$", self.get("/metrics").text, re.M)
        return float(found.group(1)) if found else 0.0

    def send(self, sig: signal.Signals) -> None:
        self._process.send_signal(sig)

    def wait(self) -> int:
        """The exit code."""
        code = self._process.wait(60)
        self._reader.join()
        return code

    def close(self) -> None:
        self._process.kill()
        self.wait()
        assert self._process.stderr is not None
        self._process.stderr.close()


@contextlib.contextmanager
def processes(*started: Process) -> Iterator[tuple[Process, ...]]:
    """The processes, once all are ready; none is left behind."""
    try:
        for process in started:
            wait_until(process.ready, 60)
        yield started
    finally:
        for process in started:
            process.close()
