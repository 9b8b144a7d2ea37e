"""A server on a real port that answers each connection as a script says, faults included."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

Act = Callable[[socket.socket], None]


def answers(status: int, body: bytes, **headers: str) -> Act:
    """A whole answer."""
    lines = [f"HTTP/1.1 {status} -", f"Content-Length: {len(body)}", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    head = "\r\n".join([*lines, "", ""]).encode()
    return lambda connection: connection.sendall(head + body)


def refuses(status: int, code: str, *, retryable: bool, param: str | None = None, **headers: str) -> Act:
    """An error in the service's shape."""
    error = {"type": "-", "code": code, "message": "-", "param": param, "request_id": "r1", "retryable": retryable}
    return answers(status, json.dumps({"error": error}).encode(), **headers)


def breaks(connection: socket.socket) -> None:
    """The connection closes without a word."""


def cuts_short(connection: socket.socket) -> None:
    """The answer ends before its length."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")


def hangs(connection: socket.socket) -> None:
    """No answer comes until the client has gone."""
    connection.recv(1)


def drips(connection: socket.socket) -> None:
    """The answer comes, a byte at a time, for longer than anybody waits."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    _drip(connection)


def drips_its_head(connection: socket.socket) -> None:
    """The headers come, a byte at a time, for longer than anybody waits."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nX-Long: ")
    _drip(connection)


def _drip(connection: socket.socket) -> None:
    for _ in range(1500):
        connection.sendall(b" ")
        time.sleep(0.02)


class ScriptedServer:
    """Follows the script, one act a connection, and keeps the head of each request."""

    def __init__(self, *script: Act) -> None:
        self._script: Sequence[Act] = script
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve)
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()

    def _serve(self) -> None:
        for act in self._script:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                try:
                    self.requests.append(_read_request(connection))
                    act(connection)
                except OSError:
                    pass


def _read_request(connection: socket.socket) -> str:
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    length = next((int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0)
    while len(body) < length:
        body += connection.recv(65536)
    return head.decode()
