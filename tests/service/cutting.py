"""A door in front of a port, at which answers get lost."""

from __future__ import annotations

import select
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Door(socketserver.ThreadingTCPServer):
    """Passes everything on to ``inner``. In place of what is lost the connection ends."""

    daemon_threads = True

    def __init__(self, inner: int) -> None:
        super().__init__(("127.0.0.1", 0), _Passing)
        self.inner = inner
        self.port: int = self.server_address[1]
        self.lost: list[bytes] = []
        self._losing: list[bytes] = []

    def lose(self, request: bytes, times: int = 1) -> None:
        """Lose the answers to the next requests that have these bytes in them."""
        self._losing += [request] * times

    def loses(self, data: bytes) -> bool:
        """Whether the answer to this is to be lost, which counts."""
        found = [request for request in self._losing if request in data][:1]
        for request in found:
            self._losing.remove(request)
            self.lost.append(request)
        return bool(found)


class _Passing(socketserver.BaseRequestHandler):
    server: Door

    def handle(self) -> None:
        losing = False
        with socket.create_connection(("127.0.0.1", self.server.inner)) as inner:
            while True:
                for side in select.select([self.request, inner], [], [])[0]:
                    data = side.recv(65536)
                    if not data or (losing and side is inner):
                        return
                    if side is inner:
                        self.request.sendall(data)
                    else:
                        losing = self.server.loses(data) or losing
                        inner.sendall(data)


@contextmanager
def cutting_door(port: int) -> Iterator[Door]:
    """A door to that port of this host."""
    with Door(port) as door:
        serving = threading.Thread(target=door.serve_forever, args=(0.05,))
        serving.start()
        try:
            yield door
        finally:
            door.shutdown()
            serving.join()
