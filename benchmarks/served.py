"""A service in a process of its own, and a client that costs next to nothing of the machine that both share."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

import click

HOST = "127.0.0.1"
START_S = 120.0

_END = b"\r\n\r\n"


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
            writer.write(_request(path, body, "Connection: close"))
            status, headers = _head(await reader.readuntil(_END))
            return Answer(status, headers, await reader.readexactly(int(headers["content-length"])))
        finally:
            writer.close()

    async def made(self, path: str, body: bytes) -> bytes:
        """The body of an answer that must have images."""
        answer = await self.post(path, body)
        if answer.status != 200:
            raise click.ClickException(answer.body.decode())
        return answer.body

    @contextmanager
    def one_by_one(self) -> Iterator[Callable[[str, bytes], Answer]]:
        """Posts JSON, one request after the other over one connection."""
        with socket.create_connection((HOST, self.port)) as line, line.makefile("rb") as answers:
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

            def post(path: str, body: bytes) -> Answer:
                line.sendall(_request(path, body, "Connection: keep-alive"))
                status, headers = _head(b"".join(iter(answers.readline, b"\r\n")) + b"\r\n")
                return Answer(status, headers, answers.read(int(headers["content-length"])))

            yield post

    def memory_mib(self) -> float:
        """What the process has in memory now."""
        pages = int(Path(f"/proc/{self.process}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def cpu_s(self) -> float:
        """Processor time that the process has used."""
        fields = Path(f"/proc/{self.process}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _request(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", f"Host: {HOST}", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "\r\n"]).encode() + body


def _head(text: bytes) -> tuple[int, dict[str, str]]:
    """The status and the headers of an answer that begins with ``text``."""
    first, *lines = text.decode().removesuffix("\r\n\r\n").split("\r\n")
    pairs = (line.partition(":") for line in lines)
    return int(first.split()[1]), {name.lower(): value.strip() for name, _, value in pairs}


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
    connection = HTTPConnection(HOST, served.port)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
