"""The Python client's jobs, and that a call which is tried again is not made again; blocking and awaited."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest

from engines.pipeline import Edit, Generate, Inpaint, Pipeline
from service.app import create_app
from service.client import AsyncClient, Client, Job, JobFailed, Retries, ServiceError
from service.settings import Settings
from tests.service.helpers import Gate, box_mask, listening, pipeline_of, png, random_image
from tests.service.scripted import ScriptedServer, answers, breaks, refuses

IMAGE = random_image(1)
MASK = box_mask()
SOON = Retries(tries=4, first_wait_s=0.01)
IMAGES = {
    "id": "j1", "created": 0, "model": "tiny", "revision": "r", "images": [], "batch": {"ticks": []},
    "timings": {"queue_ms": 0, "encode_ms": 0, "denoise_ms": 0, "decode_ms": 0, "total_ms": 0},
}  # fmt: skip


class Asking:
    """One of the two clients, called the same way."""

    def __init__(self, url: str, awaited: bool) -> None:
        self._url = url
        self._awaited = awaited

    def __call__(self, method: str, *arguments: Any, retries: Retries = SOON, **options: Any) -> Any:
        if not self._awaited:
            with Client(self._url, retries=retries, timeout_s=60) as client:
                return getattr(client, method)(*arguments, **options)

        async def ask() -> Any:
            async with AsyncClient(self._url, retries=retries, timeout_s=60) as client:
                return await getattr(client, method)(*arguments, **options)

        return anyio.run(ask)


@pytest.fixture(params=[False, True], ids=["blocking", "awaited"])
def awaited(request: pytest.FixtureRequest) -> bool:
    found: bool = request.param
    return found


@pytest.fixture
def served(bundle_path: Path) -> Iterator[tuple[str, Pipeline]]:
    app = create_app(Settings(bundle=str(bundle_path), backend="fake", threads=1))
    with listening(app) as port:
        yield f"http://127.0.0.1:{port}", pipeline_of(app.state.service)


def test_jobs_make_what_calls_make(served: tuple[str, Pipeline], awaited: bool) -> None:
    url, pipeline = served
    ask = Asking(url, awaited)
    jobs = [
        ask("submit_generate", "a cat", steps=2, seed=7),
        ask("submit_edit", png(IMAGE), "the sun", strength=0.5, seed=7),
        ask("submit_inpaint", png(IMAGE), png(MASK), "a star", seed=7),
    ]
    expected = pipeline.run(
        [
            Generate("a cat", 2, 2.0, 7),
            Edit("the sun", 4, 2.0, 7, IMAGE, 0.5),
            Inpaint("a star", 4, 2.0, 7, IMAGE, MASK == 255),
        ]
    )
    for job, pixels in zip(jobs, expected, strict=True):
        made = ask("wait", job.id, every_s=0.01)
        assert np.array_equal(np.asarray(made.images[0].picture), pixels)
        found = ask("job", job.id)
        assert (found.status, found.over, found.done, found.total) == ("done", True, job.total, job.total)
        assert found.result.images[0].seed == 7


def test_a_job_is_followed_and_cancelled(
    served: tuple[str, Pipeline], awaited: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, pipeline = served
    ask, gate = Asking(url, awaited), Gate(pipeline, monkeypatch)
    job = ask("submit_generate", "a cat", steps=4)
    assert (job.over, job.done, job.total) == (False, 0, 4)
    with pytest.raises(ValueError, match="not over"):
        _ = job.result
    told: list[Job] = []

    def cancel(found: Job) -> None:
        if not told:
            with Client(url) as client:
                client.cancel(job.id)
        told.append(found)
        gate.opened.set()

    with pytest.raises(JobFailed) as caught:
        ask("wait", job.id, every_s=0.01, progress=cancel)
    assert {found.id for found in told} == {job.id}
    assert (caught.value.code, caught.value.param) == ("cancelled", None)
    assert ask("cancel", job.id).status == "cancelled"
    with pytest.raises(ServiceError) as unknown:
        ask("job", "no such?job")
    assert (unknown.value.status, unknown.value.code) == (404, "job_not_found")


def keys(server: ScriptedServer) -> list[str]:
    return [key for head in server.requests for key in re.findall(r"(?im)^idempotency-key: (\S+?)\r?$", head)]


@pytest.mark.parametrize("method", ["generate", "submit_generate"])
def test_every_try_of_a_call_has_the_same_key(awaited: bool, method: str) -> None:
    job = {
        "id": "j1", "status": "queued", "created": 0, "model": "tiny", "revision": "r", "position": 0,
        "progress": {"done": 0, "total": 4}, "preview": None, "result": None, "error": None,
    }  # fmt: skip
    good = answers(200, json.dumps(IMAGES).encode()) if method == "generate" else answers(202, json.dumps(job).encode())
    with ScriptedServer(breaks, refuses(503, "not_ready", retryable=True), good, good) as server:
        ask = Asking(server.url, awaited)
        assert ask(method, "a cat").id == "j1"
        assert ask(method, "a cat").id == "j1"
        first, second, third, other = keys(server)
        assert first == second == third != other
        prefers = [bool(re.search(r"(?im)^prefer: respond-async\r?$", head)) for head in server.requests]
        assert prefers == [method == "submit_generate"] * 4


def test_a_call_of_one_try_has_no_key(awaited: bool) -> None:
    with ScriptedServer(answers(200, json.dumps(IMAGES).encode())) as server:
        Asking(server.url, awaited)("generate", "a cat", retries=Retries(tries=1))
        assert keys(server) == []


def test_questions_have_no_key(awaited: bool) -> None:
    with ScriptedServer(breaks, refuses(404, "job_not_found", retryable=False)) as server:
        with pytest.raises(ServiceError):
            Asking(server.url, awaited)("job", "j1")
        assert len(server.requests) == 2
        assert keys(server) == []
