"""What pages of other origins may ask, and under which names the service answers."""

from __future__ import annotations

import httpx
import pytest
from starlette.types import ASGIApp

from service import server
from service.security.cross_origin import is_loopback, is_own
from service.server import Server
from service.settings import Settings
from tests.service.helpers import Running, error, running

pytestmark = pytest.mark.anyio

EVIL = "https://evil.example"
GALLERY = "https://gallery.example"
FORM = {"prompt": (None, "a cat"), "steps": (None, "1")}


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": EVIL},
        {"Origin": EVIL, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
        {"Origin": "http://test:3000"},
        {"Origin": "http://test.evil.example"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Sec-Fetch-Site": "cross-site"},
        {"Origin": "http://test:3000", "Sec-Fetch-Site": "same-site"},
    ],
)
async def test_pages_of_other_origins_may_ask_for_nothing(app: Running, headers: dict[str, str]) -> None:
    forms = [await app.client.post(path, files=FORM, headers=headers) for path in ("/generate", "/v1/images/edits")]
    for answer in (
        *forms,
        await app.client.post("/models/tiny/unload", headers=headers),
        await app.client.delete("/jobs/x", headers=headers),
    ):
        found = error(answer, 403, "foreign_origin", "origin")
        assert found["type"] == "permission_error"
        assert "FEWSTEP_CORS_ORIGINS" in found["message"]
    assert app.metric("fewstep_rejected_total", reason="foreign_origin") == 4
    assert app.metric("fewstep_images_total") == 0
    assert (await app.client.get("/models", headers=headers)).json()["models"][0]["loaded"]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": "http://test"},
        {"Origin": "http://test", "Sec-Fetch-Site": "same-origin"},
        {"Origin": "https://test"},
        {"Origin": "https://images.example", "Host": "images.example"},
        {"Origin": "https://images.example", "Host": "images.example:443"},
        {"Origin": "http://192.168.1.5:8000", "Host": "192.168.1.5:8000"},
        {"Origin": "http://[::1]:8000", "Host": "[::1]:8000"},
        {"Origin": "https://images.example", "Host": "inside:8000", "Sec-Fetch-Site": "same-origin"},
        {"Origin": GALLERY},
        {"Origin": GALLERY, "Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "none"},
    ],
    ids=str,
)
async def test_the_page_itself_programs_and_listed_origins_may(
    anyio_backend: str, settings: Settings, headers: dict[str, str]
) -> None:
    async with running(settings.model_copy(update={"cors_origins": (GALLERY,)})) as app:
        answer = await app.client.post("/generate", files=FORM, headers=headers)
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("origin", "host", "own"),
    [
        ("http://a.example", "a.example:80", True),
        ("http://A.example:8000", "a.EXAMPLE:8000", True),
        ("http://a.example:8000", "a.example", False),
        ("http://a.example", "a.example:443", False),
        ("http://a.example", "a.example.evil.example", False),
        ("http://[::1]", "[::1]", True),
        ("http://[::1]:1", "[::1]:2", False),
        ("null", "null", False),
        ("file://", "", False),
        ("chrome-extension://abc", "abc", False),
        ("http://", "a.example", False),
    ],
)
def test_an_origin_is_the_services_own_by_name_and_port(origin: str, host: str, own: bool) -> None:
    assert is_own(origin, host) is own


@pytest.mark.parametrize(
    ("name", "loopback"),
    [
        *(
            (name, True)
            for name in ("localhost", "localhost.", "app.localhost", "127.0.0.1", "127.8.9.1", "[::1]", "::1")
        ),
        *((name, False) for name in ("", "0.0.0.0", "::", "192.168.1.5", "127.0.0.1.evil.example", "notlocalhost")),
    ],
)
def test_loopback_names(name: str, loopback: bool) -> None:
    assert is_loopback(name) is loopback


def served(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> httpx.AsyncClient:
    """A client of the app that ``run`` would serve."""
    apps: list[ASGIApp] = []
    with monkeypatch.context() as patched:
        patched.setattr(Server, "run", lambda self: apps.append(self.config.app))
        server.run(settings)
    return httpx.AsyncClient(transport=httpx.ASGITransport(apps[0]), base_url="http://127.0.0.1:8000")


async def test_on_loopback_only_its_own_names_are_served(
    anyio_backend: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(settings.model_copy(update={"cors_origins": (GALLERY,)}), monkeypatch) as client:
        for host in ("127.0.0.1:8000", "localhost:9000", "[::1]:8000", "app.localhost", "gallery.example"):
            assert (await client.get("/livez", headers={"Host": host})).status_code == 200, host
        for host in ("rebound.evil.example:8000", "gallery.example.evil.example", "192.168.1.5:8000", ""):
            headers = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
            for path in ("/livez", "/", "/capabilities", "/metrics"):
                found = error(await client.get(path, headers=headers), 403, "foreign_host", "host")
                assert "FEWSTEP_CORS_ORIGINS" in found["message"]


async def test_on_other_addresses_every_name_is_served(
    anyio_backend: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(settings.model_copy(update={"host": "0.0.0.0"}), monkeypatch) as client:
        assert (await client.get("/livez", headers={"Host": "api:8000"})).status_code == 200
