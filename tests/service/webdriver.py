"""A headless Chromium, driven over the W3C WebDriver protocol with nothing but the standard library."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromedriver")
_FLAGS = (
    "headless=new",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "disable-dev-shm-usage",
    "no-first-run",
    "disable-extensions",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "window-size=1280,900",
)
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's name of an element reference
ENTER, SPACE, RIGHT, DOWN, CONTROL = "\ue007", " ", "\ue014", "\ue015", "\ue009"


def missing_programs() -> list[str]:
    """Those of the needed programs that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


class Browser:
    """One window."""

    def __init__(self, session_url: str) -> None:
        self._url = session_url

    def go(self, url: str) -> None:
        _call("POST", f"{self._url}/url", {"url": url})

    def js(self, script: str, *arguments: Any) -> Any:
        """Run a function body in the page; returns what it returns."""
        return _call("POST", f"{self._url}/execute/sync", {"script": script, "args": arguments})

    def wait(self, expression: str, seconds: float = 60.0) -> None:
        """Wait until a JavaScript expression is true."""
        deadline = time.monotonic() + seconds
        while not self.js(f"return Boolean({expression})"):
            assert time.monotonic() < deadline, f"waited in vain for {expression}"
            time.sleep(0.02)

    def text(self, selector: str) -> str:
        return str(self.js("return document.querySelector(arguments[0]).textContent", selector)).strip()

    def focus(self, selector: str) -> None:
        self.js("document.querySelector(arguments[0]).focus()", selector)

    def press(self, *keys: str) -> None:
        """Press and release keys, one after the other, where the focus is."""
        steps = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._keys(steps)

    def chord(self, held: str, key: str) -> None:
        """Press ``key`` while ``held`` is down."""
        order = (("keyDown", held), ("keyDown", key), ("keyUp", key), ("keyUp", held))
        self._keys([{"type": kind, "value": value} for kind, value in order])

    def upload(self, selector: str, path: Path) -> None:
        """Choose a file in a file input."""
        query = {"using": "css selector", "value": selector}
        element = _call("POST", f"{self._url}/element", query)[_ELEMENT]
        _call("POST", f"{self._url}/element/{element}/value", {"text": str(path)})

    def console(self) -> list[str]:
        """What the page logged since the last call."""
        return [entry["message"] for entry in _call("POST", f"{self._url}/se/log", {"type": "browser"})]

    def _keys(self, steps: Sequence[dict[str, str]]) -> None:
        device = {"type": "key", "id": "keyboard", "actions": steps}
        _call("POST", f"{self._url}/actions", {"actions": [device]})


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A window with a profile of its own in the folder ``profile``."""
    options = {
        "binary": shutil.which("chromium"),
        "args": [*(f"--{flag}" for flag in _FLAGS), f"--user-data-dir={profile}"],
    }
    wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
    with subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True) as driver:
        try:
            root = f"http://127.0.0.1:{_port(driver)}"
            session = _call("POST", f"{root}/session", {"capabilities": {"alwaysMatch": wanted}})
            session_url = f"{root}/session/{session['sessionId']}"
            try:
                yield Browser(session_url)
            finally:
                _call("DELETE", session_url)
        finally:
            driver.terminate()


def _port(driver: subprocess.Popen[str]) -> int:
    assert driver.stdout is not None
    for line in driver.stdout:
        if found := re.search(r"started successfully on port (\d+)", line):
            return int(found[1])
    raise AssertionError("chromedriver did not start")


def _call(method: str, url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["value"]
