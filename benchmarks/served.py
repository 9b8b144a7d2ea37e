"""A service in a process of its own, and a client that costs next to nothing of the machine that both share."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

import click

HOST = "127.0.0.1"
START_S = 120.0


@dataclass(frozen=True)
class Answer:
    """A whole answer; the names of its headers are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Served:
    """The service on a port, and the number of its process."""

    port: int
    process: int

    async def post(self, path: str, body: bytes) -> Answer:
        """The answer to JSON, over a connection of its own."""
        reader, writer = await asyncio.open_connection(HOST, self.port)
        try:
            head = f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\nConnection: close\r\n"
            writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
            return Answer(int(lines[0].split()[1]), headers, await reader.readexactly(int(headers["content-length"])))
        finally:
            writer.close()

    async def made(self, path: str, body: bytes) -> bytes:
        """The body of an answer that must have images."""
        answer = await self.post(path, body)
        if answer.status != 200:
            raise click.ClickException(answer.body.decode())
        return answer.body

    def connection(self) -> HTTPConnection:
        """For one request after the other."""
        return HTTPConnection(HOST, self.port)

    def memory_mib(self) -> float:
        """What the process has in memory now."""
        pages = int(Path(f"/proc/{self.process}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def cpu_s(self) -> float:
        """Processor time that the process has used."""
        fields = Path(f"/proc/{self.process}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def serving(bundle: str, backend: str, threads: int) -> Iterator[Served]:
    """A service that is ready, with settings of its own for nothing but these."""
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    options = {"port": port, "bundle": bundle, "backend": backend, "threads": threads, "log-level": "warning"}
    command = [sys.executable, "-m", "fewstep", "serve", *(f"--{name}={value}" for name, value in options.items())]
    with subprocess.Popen(command) as process:
        try:
            served = Served(port, process.pid)
            _wait_until_ready(served, process)
            yield served
        finally:
            process.terminate()


def _wait_until_ready(served: Served, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + START_S
    while not _ready(served):
        if process.poll() is not None or time.monotonic() > until:
            raise click.ClickException("the service did not become ready")
        time.sleep(0.1)


def _ready(served: Served) -> bool:
    connection = served.connection()
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
