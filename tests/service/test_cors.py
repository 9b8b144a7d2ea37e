"""What pages of the origins that are listed may send and read, and that others are told nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.security.api_keys import ApiKey, digest_of
from service.settings import Settings
from tests.service.helpers import Running, error, running

pytestmark = pytest.mark.anyio

ORIGIN = "https://gallery.example"
OTHERS = ("https://other.example", f"{ORIGIN}.evil.example", "null")
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
KEY = {"Authorization": "Bearer key of ann"}


@pytest.fixture
async def app(anyio_backend: str, settings: Settings, tmp_path: Path) -> AsyncIterator[Running]:
    keys_file = tmp_path / "keys"
    keys_file.write_text(ApiKey("ann", digest_of("key of ann")).line)
    async with running(settings.model_copy(update={"cors_origins": (ORIGIN,), "api_keys_file": keys_file})) as this:
        yield this


async def test_other_origins_are_told_nothing_by_default(anyio_backend: str, settings: Settings) -> None:
    async with running(settings) as app:
        for answer in (
            await app.client.get("/capabilities", headers={"Origin": ORIGIN}),
            await app.client.options("/generate", headers={"Origin": ORIGIN, **PREFLIGHT}),
        ):
            assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_listed_origins_may_call_with_a_key_and_never_with_cookies(app: Running) -> None:
    asked = await app.client.options("/generate", headers={"Origin": ORIGIN, **PREFLIGHT})
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == ORIGIN
    assert "POST" in asked.headers["access-control-allow-methods"]
    refused = await app.client.get("/capabilities", headers={"Origin": ORIGIN})
    error(refused, 401, "unauthorized")
    assert refused.headers["access-control-allow-origin"] == ORIGIN, "a page can read why it was refused"
    answer = await app.client.get("/capabilities", headers={"Origin": ORIGIN, **KEY})
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert "x-request-id" in answer.headers["access-control-expose-headers"].lower()
    assert answer.headers["vary"] == "Origin"
    assert "access-control-allow-credentials" not in answer.headers


@pytest.mark.parametrize("other", OTHERS)
async def test_origins_that_are_not_listed_are_refused_in_the_one_shape(app: Running, other: str) -> None:
    read = await app.client.get("/capabilities", headers={"Origin": other, **KEY})
    asked = await app.client.options("/generate", headers={"Origin": other, **PREFLIGHT})
    error(asked, 403, "foreign_origin", "origin")
    for answer in (read, asked):
        assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_a_page_may_send_any_header(app: Running) -> None:
    names = "authorization,content-type,idempotency-key,x-stainless-os,x-stainless-runtime-version"
    headers = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": names}
    asked = await app.client.options("/v1/images/generations", headers=headers)
    assert (asked.status_code, asked.headers["access-control-allow-headers"]) == (200, names)


async def test_a_page_can_read_that_the_service_failed(app: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(app.service, "require_loaded", broken)
    answer = await app.client.get("/models", headers={"Origin": ORIGIN, **KEY})
    error(answer, 500, "internal_error")
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert "x-request-id" in answer.headers["access-control-expose-headers"].lower()


async def test_options_that_are_no_preflight_are_another_method(app: Running) -> None:
    for headers in ({"Origin": ORIGIN, **KEY}, KEY):
        error(await app.client.options("/generate", headers=headers), 405, "method_not_allowed")


@pytest.mark.parametrize(
    "origins",
    [
        "*",
        "gallery.example",
        "https://gallery.example/",
        "https://a.example https://b.example",
        "https://gallery.example:443",
        "http://gallery.example:80",
        "https://gallery.example:99999",
        "https://gallery.example:0",
    ],
)
def test_what_is_no_origin_is_refused(origins: str) -> None:
    with pytest.raises(ValidationError, match="cors_origins"):
        Settings(cors_origins=origins)  # type: ignore[arg-type]


def test_origins_come_from_the_environment_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CORS_ORIGINS", "https://a.example, http://localhost:3000")
    assert Settings().cors_origins == ("https://a.example", "http://localhost:3000")
