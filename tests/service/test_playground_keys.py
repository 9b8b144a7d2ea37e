"""The page at / in a browser, where the service asks for a key: which it takes, and what it spends of its rate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from service.app import create_app
from service.security.api_keys import ApiKey, digest_of, new_key
from service.settings import Settings
from tests.service import webdriver
from tests.service.helpers import listening
from tests.service.webdriver import ANSWERED, READY, Browser

KEY = new_key()
WITHOUT_STORAGE = "Storage.prototype.setItem = () => { throw new DOMException('no', 'SecurityError'); }"
# Refuses the first request for each of the two that the page begins with, and notes what it says and how often it asks.
REFUSING = """
    const real = window.fetch;
    window.asked = {};
    window.said = [];
    window.fetch = (url, options) => {
        const name = String(url).match(/(models|capabilities|readyz)([?].*)?$/)?.[1];
        if (!name) return real(url, options);
        window.said.push(document.querySelector("#state").textContent);
        window.asked[name] = (window.asked[name] ?? 0) + 1;
        if (name === "readyz" || window.asked[name] > 1) return real(url, options);
        const body = JSON.stringify({ error: { message: "come back later" } });
        return Promise.resolve(new Response(body, { status: STATUS, headers: { "Retry-After": "1" } }));
    };
"""

Opened = Callable[..., AbstractContextManager[Browser]]


@pytest.fixture
def opened(window: Browser, bundle_path: Path, tmp_path: Path) -> Opened:
    """Opens the page of a service that knows `KEY`, with a rate."""

    @contextmanager
    def open_page(per_minute: float | None = None, open_metrics: bool = True) -> Iterator[Browser]:
        (tmp_path / "keys").write_text(ApiKey("ann", digest_of(KEY), per_minute).line)
        settings = Settings(
            bundle=str(bundle_path), threads=1, api_keys_file=tmp_path / "keys", open_metrics=open_metrics
        )
        with listening(create_app(settings)) as port:
            window.go(f"http://127.0.0.1:{port}/")
            window.wait("document.activeElement.id === 'key'")
            yield window

    return open_page


@pytest.mark.parametrize(("before", "after", "unfit"), [("“", "”", "“"), ("", "—", "—"), ("a🗝", "", "🗝")])
def test_a_key_that_no_request_can_carry_is_refused(opened: Opened, before: str, after: str, unfit: str) -> None:
    with opened() as page:
        _give(page, before + KEY + after)
        page.wait("document.querySelector('#error-key').textContent")
        assert page.text("#error-key") == f"A key has no {unfit} in it. Copy it again, by itself."
        assert page.js("return document.activeElement.id") == "key"
        assert page.js("return document.querySelector('#key').getAttribute('aria-invalid')") == "true"
        _give(page, KEY)
        page.wait(READY)


def test_a_browser_that_keeps_no_key_is_said_to(opened: Opened) -> None:
    with opened() as page:
        page.js(WITHOUT_STORAGE)
        _give(page, KEY)
        page.wait("document.querySelector('#error-key').textContent")
        assert page.text("#error-key").startswith("This browser keeps nothing for this page")


@pytest.mark.parametrize("status", [429, 503])
def test_what_is_refused_for_a_while_is_asked_for_again(window: Browser, bundle_path: Path, status: int) -> None:
    source = REFUSING.replace("STATUS", str(status))
    script = window.devtools("Page.addScriptToEvaluateOnNewDocument", source=source)
    try:
        with listening(create_app(Settings(bundle=str(bundle_path), threads=1))) as port:
            window.go(f"http://127.0.0.1:{port}/")
            window.wait(READY)
            asked = window.js("return window.asked")
            assert (asked["models"], asked["capabilities"]) == (2, 2)
            assert "Come back later. Trying again in 1 s." in window.js("return window.said")
            assert window.text("#problem") == ""
    finally:
        window.devtools("Page.removeScriptToEvaluateOnNewDocument", **script)


def test_the_rate_of_a_key_is_spent_on_images_alone(opened: Opened) -> None:
    """Two requests for what the model can do and two for the image are all that this key may make."""
    with opened(per_minute=4, open_metrics=False) as page:
        _give(page, KEY)
        page.wait(READY)
        page.js("document.querySelector('#prompt').value = 'a red cat'")
        page.js("document.querySelector('#submit').click()")
        page.wait(f"document.querySelector('#problem').textContent || {ANSWERED}")
        assert page.text("#problem") == ""
        assert page.js("return document.querySelector('#queue').hidden")


def _give(page: Browser, key: str) -> None:
    page.js("document.querySelector('#key').value = arguments[0]", key)
    page.focus("#key")
    page.press(webdriver.ENTER)
