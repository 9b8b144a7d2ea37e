"""No option in the URL and no body is taken and ignored."""

from __future__ import annotations

import httpx
import pytest

from service.app import create_app
from service.settings import Settings
from tests.service.asked import ask
from tests.service.helpers import Running, error, listening

pytestmark = pytest.mark.anyio

READING = ["/capabilities", "/models", "/v1/models", "/v1/models/tiny"]
CHANGING = ["/models/tiny/load", "/models/tiny/unload"]


@pytest.mark.parametrize("path", READING)
async def test_unknown_options_of_what_is_read_are_refused(app: Running, path: str) -> None:
    assert (await app.client.get(path)).status_code == 200
    for query in ("modle=x", "x", "model[]=tiny"):
        found = error(await app.client.get(f"{path}?{query}"), 422, "unknown_field", "query")
        assert query.partition("=")[0] in found["message"]
    assert (await app.client.head(f"{path}?x=1")).status_code == 422
    error(await app.client.request("GET", path, json={"model": "x"}), 422, "unknown_field", "body")


@pytest.mark.parametrize("path", CHANGING)
async def test_options_and_bodies_of_what_takes_none_are_refused(app: Running, path: str) -> None:
    error(await app.client.post(f"{path}?precision=fp16"), 422, "unknown_field", "query")
    error(await app.client.post(path, json={"steps": 3}), 422, "unknown_field", "body")
    assert (await app.client.get("/models")).json()["models"][0]["loaded"]
    assert (await app.client.post(path)).status_code == 200


def test_a_body_is_refused_before_it_comes(settings: Settings) -> None:
    with (
        listening(create_app(settings)) as port,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client,
    ):
        for content in (b"x" * 2_000_000, iter([b"x"])):
            error(client.post("/models/tiny/load", content=content), 422, "unknown_field", "body")
        assert client.post("/models/tiny/load", content=b"").status_code == 200


async def test_jobs_take_no_body(app: Running) -> None:
    job_id = await ask(app)
    error(await app.client.request("DELETE", f"/jobs/{job_id}", json={"why": "late"}), 422, "unknown_field", "body")
    assert (await app.client.delete(f"/jobs/{job_id}")).status_code == 200


async def test_an_option_is_given_once_and_has_a_value_that_fits(app: Running) -> None:
    assert (await app.client.get("/capabilities?model=tiny")).status_code == 200
    error(await app.client.get("/capabilities?model=tiny&model=tiny"), 422, "duplicate_field", "model")
    found = error(await app.client.get("/jobs/x/events?preview=maybe"), 422, "invalid_value", "preview")
    assert found["message"].startswith("preview: ")
