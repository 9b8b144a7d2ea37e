"""Who may ask what: keys, rates, admins, and the headers of every answer."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st
from pydantic import ValidationError

from service.app import create_app
from service.security.api_keys import ApiKey, digest_of
from service.settings import Settings
from tests.service.helpers import Running, error, running

pytestmark = pytest.mark.anyio

KEYS = {
    "ann": ApiKey("ann", digest_of("key of ann")),
    "admin": ApiKey("admin", digest_of("key of admin"), admin=True),
    "slow": ApiKey("slow", digest_of("key of slow"), per_minute=2),
}


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer key of {name}"}


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("\n".join(key.line for key in KEYS.values()))
    return path


@pytest.fixture
def locked(settings: Settings, keys_file: Path) -> Settings:
    return settings.model_copy(update={"api_keys_file": keys_file})


@pytest.fixture
async def app(anyio_backend: str, locked: Settings) -> AsyncIterator[Running]:
    async with running(locked) as this:
        yield this


@pytest.mark.parametrize(
    "headers",
    [bearer("ann"), {"Authorization": "bearer key of ann"}, {"X-Api-Key": "key of ann"}],
    ids=["bearer", "lower case", "x-api-key"],
)
async def test_a_key_opens_the_api(app: Running, headers: dict[str, str]) -> None:
    answer = await app.client.post("/generate", json={"prompt": "a cat", "steps": 1}, headers=headers)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer key of nobody"},
        {"Authorization": "Basic key of ann"},
        {"Authorization": f"Bearer {digest_of('key of ann')}"},
        {"X-Api-Key": "key of nobody"},
        {"X-Api-Key": b"\xff\x00"},
    ],
)
async def test_without_a_key_nothing_is_served(app: Running, headers: dict[str, Any]) -> None:
    for method, path in [
        ("POST", "/generate"),
        ("POST", "/models/tiny/load"),
        ("GET", "/models"),
        ("GET", "/capabilities"),
        ("GET", "/openapi.json"),
        ("GET", "/jobs/x"),
        ("GET", "/nowhere"),
        ("GET", "/livez/"),
    ]:
        answer = await app.client.request(method, path, headers=headers)
        found = error(answer, 401, "unauthorized")
        assert (found["type"], found["retryable"]) == ("authentication_error", False)
        assert answer.headers["www-authenticate"].startswith("Bearer")
    assert app.metric("fewstep_rejected_total", reason="unauthorized") == 8


@settings_of_hypothesis(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from(["Authorization", "X-Api-Key", "Traceparent", "Origin", "X-Request-ID", "Content-Length"]),
        st.binary().map(lambda value: value.replace(b"\r", b"").replace(b"\n", b"")),
    ),
    st.sampled_from(["/generate", "/models", "/readyz", "/", "/jobs/%00", "/generate/", "/%2e%2e/models"]),
)
async def test_no_header_opens_anything_or_is_a_fault(app: Running, headers: dict[str, bytes], path: str) -> None:
    answer = await app.client.get(path, headers=headers)
    assert answer.status_code == (200 if path in ("/readyz", "/") else 401)


async def test_the_orchestrator_and_the_page_need_no_key(app: Running) -> None:
    for path in ("/livez", "/readyz", "/metrics", "/", "/playground/app.js"):
        assert (await app.client.get(path)).status_code == 200, path


async def test_metrics_can_be_closed(anyio_backend: str, locked: Settings) -> None:
    async with running(locked.model_copy(update={"open_metrics": False})) as app:
        error(await app.client.get("/metrics"), 401, "unauthorized")
        assert (await app.client.get("/metrics", headers=bearer("ann"))).status_code == 200
        assert (await app.client.get("/livez")).status_code == 200


async def test_only_an_admin_loads_and_unloads(app: Running) -> None:
    for verb in ("load", "unload"):
        refused = await app.client.post(f"/models/tiny/{verb}", headers=bearer("ann"))
        assert error(refused, 403, "not_an_admin")["type"] == "permission_error"
        assert (await app.client.post(f"/models/tiny/{verb}", headers=bearer("admin"))).status_code == 200
    assert (await app.client.get("/models", headers=bearer("ann"))).status_code == 200


async def test_loading_can_be_switched_off_with_keys_or_without(
    anyio_backend: str, settings: Settings, locked: Settings
) -> None:
    for some in (settings, locked):
        async with running(some.model_copy(update={"admin": False})) as app:
            for verb in ("load", "unload"):
                answer = await app.client.post(f"/models/tiny/{verb}", headers=bearer("admin"))
                error(answer, 403, "admin_off")


async def test_a_key_that_asks_too_often_is_told_when_to_come_back(app: Running) -> None:
    for _ in range(2):
        assert (await app.client.get("/models", headers=bearer("slow"))).status_code == 200
    refused = await app.client.get("/models", headers=bearer("slow"))
    found = error(refused, 429, "rate_limited")
    assert (found["type"], found["retryable"]) == ("overloaded_error", True)
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert app.metric("fewstep_rejected_total", reason="rate_limited") == 1
    assert (await app.client.get("/models", headers=bearer("ann"))).status_code == 200


async def test_keys_change_while_the_service_runs(app: Running, keys_file: Path) -> None:
    keys_file.write_text(KEYS["admin"].line)
    error(await app.client.get("/models", headers=bearer("ann")), 401, "unauthorized")
    assert (await app.client.get("/models", headers=bearer("admin"))).status_code == 200


def test_a_bad_file_of_keys_ends_the_start(settings: Settings, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.write_text("ann:the key itself")
    for path in (bad, tmp_path / "none"):
        with pytest.raises(ValidationError, match="api_keys_file") as caught:
            Settings(api_keys_file=path)
        assert "the key itself" not in str(caught.value)
    with pytest.raises(ValidationError, match="open_metrics"):
        Settings(open_metrics=False)


def test_the_document_tells_of_keys_where_there_are_any(settings: Settings, locked: Settings) -> None:
    with_keys, without = create_app(locked).openapi(), create_app(settings).openapi()
    assert set(with_keys["components"]["securitySchemes"]) == {"HTTPBearer", "APIKeyHeader"}
    assert "securitySchemes" not in without["components"]
    for path in ("/generate", "/models", "/capabilities", "/models/{name}/load", "/jobs/{job_id}/events"):
        [operation] = with_keys["paths"][path].values()
        assert {"401", "429"} <= operation["responses"].keys()
        assert operation["security"]
    assert "security" not in with_keys["paths"]["/livez"]["get"]
    assert "security" not in with_keys["paths"]["/metrics"]["get"]
    closed = create_app(locked.model_copy(update={"open_metrics": False})).openapi()["paths"]["/metrics"]["get"]
    assert closed["security"]
    assert {"401", "429"} <= closed["responses"].keys()
    assert {"403"} <= without["paths"]["/models/{name}/load"]["post"]["responses"].keys()


@pytest.mark.parametrize("path", ["/", "/generate", "/capabilities", "/openapi.json", "/nowhere", "/playground/app.js"])
async def test_every_answer_has_headers_that_keep_browsers_strict(
    anyio_backend: str, settings: Settings, path: str
) -> None:
    async with running(settings) as app:
        headers = (await app.client.get(path)).headers
    policy = headers["content-security-policy"]
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert ("default-src 'self'" if path in ("/", "/playground/app.js") else "default-src 'none'") in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-resource-policy"] == "same-origin"


async def test_what_is_refused_is_counted_at_its_endpoint_and_logged_with_its_key(
    app: Running, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "service.access")
    for _ in range(3):
        await app.client.post("/generate", json={}, headers=bearer("slow"))
    await app.client.post("/edit", json={}, headers=bearer("nobody"))
    await app.client.delete("/jobs/1", headers={"Origin": "https://foreign.example"})
    await app.client.get("/nowhere", headers=bearer("slow"))
    assert app.metric("fewstep_requests_total", endpoint="generate", outcome="rejected") == 1
    assert app.metric("fewstep_requests_total", endpoint="unmatched", outcome="rejected") == 1
    assert app.metric("fewstep_requests_total", endpoint="edit", outcome="invalid") == 1
    assert app.metric("fewstep_requests_total", endpoint="cancel_job", outcome="invalid") == 1
    keys = [getattr(record, "key", None) for record in caplog.records if record.name == "service.access"]
    assert keys == ["slow", "slow", "slow", None, None, "slow"]
