"""What the service's tests share: an app on a tiny bundle, images, and a server on a real port."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI
from numpy.typing import NDArray
from PIL import Image

from engines.pipeline import Pipeline, Row
from service.app import create_app
from service.queue.base import JobQueue
from service.runtime import Service, State
from service.settings import Settings
from service.telemetry.tracing import Tracing

SIZE = 16

Pixels = NDArray[np.uint8]


@dataclass
class Running:
    """A client, and the app it talks to."""

    client: httpx.AsyncClient
    app: FastAPI

    @property
    def service(self) -> Service:
        service: Service = self.app.state.service
        return service

    @property
    def pipeline(self) -> Pipeline:
        return pipeline_of(self.service)

    def metric(self, name: str, **labels: str) -> float:
        return self.service.metrics.registry.get_sample_value(name, labels) or 0.0

    async def post(self, path: str, **fields: Any) -> httpx.Response:
        return await self.client.post(path, json=fields)


def pipeline_of(service: Service, name: str | None = None) -> Pipeline:
    """The pipeline of a model that is loaded, the default one for None."""
    lease = service.models.lease(name)
    assert lease is not None
    lease.release()
    return lease.pipeline


@contextlib.asynccontextmanager
async def running(
    settings: Settings,
    queue: JobQueue | None = None,
    opener: Callable[[Settings, Path], Pipeline] | None = None,
    wait: bool = True,
    tracing: Tracing | None = None,
) -> AsyncIterator[Running]:
    """The app, in this event loop."""
    app = create_app(settings, queue=queue, opener=opener, tracing=tracing)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client,
    ):
        this = Running(client, app)
        if wait:
            await until(lambda: this.service.state is State.READY)
        yield this


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.005)


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until the condition holds, outside an event loop."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


@contextlib.contextmanager
def listening(app: FastAPI) -> Iterator[int]:
    """The app on a real port, in a thread; yields the port."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, lifespan="on", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started and app.state.service.state is State.READY)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


class Gate:
    """Holds the pipeline's ticks back until it is opened."""

    def __init__(self, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.reached = threading.Event()
        tick = pipeline.tick

        def gated(rows: Sequence[Row]) -> None:
            self.reached.set()
            assert self.opened.wait(60)
            tick(rows)

        monkeypatch.setattr(pipeline, "tick", gated)


def random_image(seed: int = 0, size: int | tuple[int, int] = SIZE) -> Pixels:
    """Noise, (H, W, 3)."""
    width, height = (size, size) if isinstance(size, int) else size
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def box_mask(size: int = SIZE, part: float = 0.5) -> Pixels:
    """White in the upper left ``part`` of each side, black elsewhere, (H, W)."""
    mask = np.zeros((size, size), dtype=np.uint8)
    edge = int(size * part)
    mask[:edge, :edge] = 255
    return mask


def png(pixels: Pixels, mode: str | None = None) -> bytes:
    """The array as a PNG file."""
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(file, "png")
    return file.getvalue()


def b64(data: bytes) -> str:
    """Base64 text."""
    return base64.b64encode(data).decode()


def pixels(answer: httpx.Response, index: int = 0) -> Pixels:
    """The image of a JSON answer."""
    assert answer.status_code == 200, answer.text
    return read_pixels(base64.b64decode(answer.json()["images"][index]["b64_json"]))


def read_pixels(data: bytes) -> Pixels:
    """The pixels of an image file, (H, W, 3)."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def error(answer: httpx.Response, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    """The error of an answer, which must have the one shape, this status, code and param."""
    body = answer.json()
    assert body.keys() == {"error"}
    found: dict[str, Any] = body["error"]
    assert found.keys() == {"type", "code", "message", "param", "request_id", "retryable"}
    assert (answer.status_code, found["code"], found["param"]) == (status, code, param), found
    assert found["request_id"] == answer.headers["x-request-id"]
    assert found["message"]
    return found
