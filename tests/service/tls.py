"""A door with TLS in front of a port, with a certificate of its own making."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path


def make_certificate(openssl: str, folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that is its own authority, and its key."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    names = ("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1")
    files = ("-keyout", str(key), "-out", str(certificate))
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names, *files]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


@contextlib.contextmanager
def tls_door(
    port: int, certificate: Path, key: Path, door: int = 0, *, instead: tuple[int, int] | None = None
) -> Iterator[int]:
    """Yields the port, ``door`` or a free one, that passes everything on to ``port``.

    ``instead`` is a port and the one that stands for it in what comes back, of as many digits: so a sentinel tells of
    the door in front of the server that it knows.
    """
    hidden, shown = (b"%d" % number for number in instead or (0, 0))
    assert len(hidden) == len(shown)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    loop = asyncio.new_event_loop()
    ready, closed = threading.Event(), asyncio.Event()
    doors: list[int] = []

    async def serve() -> None:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
            back = _pass_on(inner_reader, writer, hidden, shown)
            with contextlib.suppress(asyncio.CancelledError):  # The door closes before the connection does.
                await asyncio.gather(_pass_on(reader, inner_writer), back)
            for each in (writer, inner_writer):
                each.transport.abort()

        server = await asyncio.start_server(handle, "127.0.0.1", door, ssl=context)
        doors.append(server.sockets[0].getsockname()[1])
        ready.set()
        await closed.wait()
        server.close()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert ready.wait(60)
    try:
        yield doors[0]
    finally:
        loop.call_soon_threadsafe(closed.set)
        thread.join()
        loop.close()


async def _pass_on(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, hidden: bytes = b"", shown: bytes = b""
) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data.replace(hidden, shown) if hidden != shown else data)
            await writer.drain()
    writer.close()
