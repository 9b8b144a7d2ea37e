"""The page at / in a browser: the image in the making is seen, given up, and had even where its events fail."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from engines.pipeline import Pipeline, Row
from service.app import create_app
from service.models.opening import open_pipeline
from service.settings import Settings
from tests.bundles import make_tiny_bundle
from tests.service import webdriver
from tests.service.helpers import SIZE, listening, wait_until
from tests.service.webdriver import ANSWERED, READY, Browser

WITHOUT_EVENTS = """
    const real = window.fetch;
    window.fetch = (url, options) => {
        if (!String(url).includes("/events")) return real(url, options);
        window.events = (window.events ?? 0) + 1;
        return arguments[0] ? real(url + "&no-such-option", options) : Promise.reject(new TypeError("cut"));
    };
"""


class Turnstile:
    """Holds the ticks of a pipeline: one passes for each that is let through."""

    def __init__(self) -> None:
        self._permits = threading.Semaphore(0)

    def let(self, ticks: int) -> None:
        self._permits.release(ticks)

    def open(self, settings: Settings, path: Path) -> Pipeline:
        pipeline = open_pipeline(settings, path)
        tick = pipeline.tick

        def held(rows: Sequence[Row]) -> None:
            assert self._permits.acquire(timeout=60)
            tick(rows)

        pipeline.tick = held  # type: ignore[method-assign]
        return pipeline


@pytest.fixture
def turnstile() -> Turnstile:
    return Turnstile()


@pytest.fixture
def app(bundle_path: Path, turnstile: Turnstile) -> FastAPI:
    """It gives those that wait for their images little time, and jobs their ten minutes."""
    return create_app(Settings(bundle=str(bundle_path), threads=1, timeout_ms=100), opener=turnstile.open)


@pytest.fixture
def page(window: Browser, app: FastAPI, turnstile: Turnstile) -> Iterator[Browser]:
    """The page, ready, with a prompt."""
    with listening(app) as port:
        window.go(f"http://127.0.0.1:{port}/")
        window.wait(READY)
        window.js("document.querySelector('#prompt').value = 'a red cat'")
        yield window
        turnstile.let(100)


def test_the_image_is_seen_in_the_making(page: Browser, turnstile: Turnstile) -> None:
    _submit(page)
    turnstile.let(1)
    page.wait("document.querySelector('#waiting').textContent === '1 of 4 steps'")
    assert page.js("return document.querySelector('#waiting').getAttribute('role')") == "status"
    bar = "return document.querySelector('#progress').getAttribute(arguments[0])"
    assert [page.js(bar, name) for name in ("aria-valuenow", "aria-valuemax")] == ["1", "4"]
    turnstile.let(2)
    page.wait("!document.querySelector('#preview').hidden && document.querySelector('#preview').naturalWidth > 0")
    turnstile.let(1)
    page.wait(ANSWERED)
    assert page.js("return document.querySelector('#preview').hidden")
    assert page.text("#waiting") == ""
    assert page.text("#submit") == "Generate"
    assert page.console() == []


@pytest.mark.parametrize("way", ["button", "escape", "leave"])
def test_what_nobody_waits_for_is_given_up(page: Browser, app: FastAPI, turnstile: Turnstile, way: str) -> None:
    _submit(page)
    turnstile.let(1)
    page.wait("document.querySelector('#waiting').textContent === '1 of 4 steps'")
    if way == "button":
        page.wait("!document.querySelector('#cancel').hidden")
        page.focus("#cancel")
        page.press(webdriver.ENTER)
    elif way == "escape":
        page.press(webdriver.ESCAPE)
    else:
        page.go("about:blank")
    turnstile.let(1)
    wait_until(lambda: _count(app, "cancelled") == 1, 60)
    if way != "leave":
        page.wait("document.querySelector('#progress').hidden")
        assert page.text("#problem") == ""
        assert page.js("return document.querySelector('#image').hidden")
    assert _count(app, "images") == 0


@pytest.mark.parametrize("refused", [False, True], ids=["cut", "refused"])
def test_without_events_the_job_is_asked_after_for_as_long_as_it_takes(
    page: Browser, app: FastAPI, turnstile: Turnstile, refused: bool
) -> None:
    page.js(WITHOUT_EVENTS, refused)
    _submit(page)
    for done in (1, 2):
        turnstile.let(1)
        page.wait(f"document.querySelector('#waiting').textContent === '{done} of 4 steps'")
    turnstile.let(100)
    page.wait(ANSWERED)
    assert page.js("return window.events") == 1
    assert page.js("return document.querySelectorAll('#history-list li').length") == 1
    assert (_count(app, "images"), _count(app, "cancelled")) == (1, 0)


def test_a_job_that_the_service_lost_is_told_in_words_of_the_page(page: Browser, turnstile: Turnstile) -> None:
    page.js("""
        const real = window.fetch;
        const none = { error: { message: "no job '1', or its result is kept no longer", request_id: "1" } };
        window.fetch = (url, options) => String(url).includes("/jobs/")
            ? Promise.resolve(new Response(JSON.stringify(none), { status: 404 })) : real(url, options);
    """)
    _submit(page)
    page.wait("document.querySelector('#problem').textContent")
    assert page.text("#problem").startswith("The service lost this image")
    assert "job" not in page.text("#problem")


def test_a_page_takes_what_the_service_offers_when_its_model_is_gone(
    window: Browser, bundle_path: Path, tmp_path: Path
) -> None:
    current = tmp_path / "current"
    current.symlink_to(bundle_path)
    newer = make_tiny_bundle(tmp_path / "newer", size=SIZE, name="dusk")
    with listening(create_app(Settings(bundle=str(current), threads=1))) as port:
        window.go(f"http://127.0.0.1:{port}/")
        window.wait(READY)
        window.js("document.querySelector('#prompt').value = 'a red cat'")
        current.unlink()
        current.symlink_to(newer.path)
        assert httpx.post(f"http://127.0.0.1:{port}/models/tiny/unload", timeout=60).status_code == 200
        _submit(window)
        window.wait("document.querySelector('#model').textContent.startsWith('dusk')")
        assert "no model 'tiny'" in window.text("#problem").lower()
        _submit(window)
        window.wait(ANSWERED)


def test_a_job_that_is_asked_after_is_given_up_at_once(page: Browser, app: FastAPI, turnstile: Turnstile) -> None:
    page.js(WITHOUT_EVENTS, False)
    _submit(page)
    turnstile.let(1)
    page.wait("document.querySelector('#waiting').textContent === '1 of 4 steps'")
    page.press(webdriver.ESCAPE)
    page.wait("document.querySelector('#progress').hidden")
    turnstile.let(1)
    wait_until(lambda: _count(app, "cancelled") == 1)
    assert page.text("#problem") == ""


def test_an_error_of_the_job_is_said(page: Browser, app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("broken")

    lease = app.state.service.models.lease(None)
    monkeypatch.setattr(lease.pipeline, "tick", broken)
    lease.release()
    _submit(page)
    page.wait("document.querySelector('#problem').textContent")
    assert page.js("return document.querySelector('#problem').getAttribute('role')") == "alert"
    assert page.js("return document.querySelector('#progress').hidden")
    assert page.text("#submit") == "Generate"


def _submit(page: Browser) -> None:
    page.focus("#submit")
    page.press(webdriver.ENTER)


def _count(app: FastAPI, name: str) -> float:
    """A counter of the service, over all its labels."""
    return sum(
        sample.value
        for family in app.state.service.metrics.registry.collect()
        for sample in family.samples
        if sample.name == f"fewstep_{name}_total"
    )
