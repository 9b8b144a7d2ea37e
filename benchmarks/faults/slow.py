"""Clients that are slow: they send their bodies in pieces with pauses, stop half way, or read their answers late."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

_PIECES = 10


@dataclass(frozen=True, slots=True)
class SlowPost:
    """Posts JSON: ``sent`` of the body (1 is all), over ``over_s`` seconds, and reads after ``read_after_s`` more."""

    sent: float = 1.0
    over_s: float = 0.0
    read_after_s: float = 0.0

    async def __call__(self, url: str, fields: Mapping[str, Any], headers: Mapping[str, str]) -> httpx.Response:
        """The answer. Raises httpx.TransportError."""
        parts, body = urlsplit(url), json.dumps(fields).encode()
        about = {"Host": parts.netloc, "Connection": "close", "Content-Type": "application/json", **headers}
        about["Content-Length"] = f"{len(body)}"
        lines = [f"POST {parts.path} HTTP/1.1", *(f"{name}: {value}" for name, value in about.items()), "", ""]
        try:
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        except OSError as error:
            raise httpx.ConnectError(str(error)) from error
        try:
            writer.write("\r\n".join(lines).encode())
            part = body[: int(len(body) * self.sent)]
            size = math.ceil(len(part) / _PIECES)
            for start in range(0, len(part), size):
                await asyncio.sleep(self.over_s / _PIECES)
                writer.write(part[start : start + size])
                await writer.drain()
            await asyncio.sleep(self.read_after_s)
            return _response(await reader.read())
        except OSError as error:
            raise httpx.ReadError(str(error)) from error
        finally:
            writer.close()


def _response(data: bytes) -> httpx.Response:
    head, found, content = data.partition(b"\r\n\r\n")
    if not found:
        raise httpx.RemoteProtocolError("the connection was closed before an answer")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    return httpx.Response(int(status.split(" ")[1]), headers=headers, content=content)
