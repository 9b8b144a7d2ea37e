"""The page at / in a browser, where the service asks for a key: which it takes, and what it spends of its rate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from service.api_keys import ApiKey, digest_of, new_key
from service.app import create_app
from service.settings import Settings
from tests.service import webdriver
from tests.service.helpers import listening
from tests.service.webdriver import READY, Browser

KEY = new_key()
WITHOUT_STORAGE = "Storage.prototype.setItem = () => { throw new DOMException('no', 'SecurityError'); }"

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


def _give(page: Browser, key: str) -> None:
    page.js("document.querySelector('#key').value = arguments[0]", key)
    page.focus("#key")
    page.press(webdriver.ENTER)
