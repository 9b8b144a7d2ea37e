"""A headless Chromium, driven over the W3C WebDriver protocol with nothing but the standard library."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

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
)
Device = Literal["desktop", "phone"]
_DEVICES: dict[Device, dict[str, Any]] = {
    "desktop": {"width": 1280, "height": 800, "pixelRatio": 1, "touch": False, "mobile": False},
    "phone": {"width": 390, "height": 844, "pixelRatio": 2, "touch": True, "mobile": True},
}
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's name of an element reference
ENTER, SPACE, RIGHT, DOWN, CONTROL = "\ue007", " ", "\ue014", "\ue015", "\ue009"
TAB, ESCAPE = "\ue004", "\ue00c"

# The page at /: it can take a request; it has the answer to one.
READY = "document.querySelector('#state').dataset.state === 'ready'"
ANSWERED = "!document.querySelector('#image').hidden && document.querySelector('#progress').hidden"


def missing_programs() -> list[str]:
    """Those of the needed programs that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


class Browser:
    """One window."""

    def __init__(self, session_url: str) -> None:
        self._url = session_url

    def reset(self) -> None:
        """Forget the page, what it logged and what it was made to find."""
        self.go("about:blank")
        self.emulate()
        self.console()

    def go(self, url: str) -> None:
        _call("POST", f"{self._url}/url", {"url": url})

    def js(self, script: str, *arguments: Any) -> Any:
        """Run a function body in the page; returns what it returns."""
        return _call("POST", f"{self._url}/execute/sync", {"script": script, "args": arguments})

    def wait(self, expression: str, seconds: float = 60.0) -> None:
        """Wait until a JavaScript expression is true."""
        deadline = time.monotonic() + seconds
        while not self.js(f"return Boolean({expression})"):
            assert time.monotonic() < deadline, f"waited in vain for {expression}: {self.console()}"
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

    def rgba(self, selector: str, size: int) -> list[int]:
        """The pixels of an image or canvas of ``size`` x ``size`` in the page, row by row."""
        script = """
            const [selector, size] = arguments;
            const context = new OffscreenCanvas(size, size).getContext("2d");
            context.drawImage(document.querySelector(selector), 0, 0);
            return [...context.getImageData(0, 0, size, size).data];
        """
        found: list[int] = self.js(script, selector, size)
        return found

    def screenshot(self, path: Path) -> None:
        """Save what the window shows as PNG."""
        path.write_bytes(base64.b64decode(_call("GET", f"{self._url}/screenshot")))

    def emulate(self, **features: str) -> None:
        """Have the page find these media features, such as ``prefers_color_scheme="dark"``."""
        wanted = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.devtools("Emulation.setEmulatedMedia", features=wanted)

    def devtools(self, command: str, **parameters: Any) -> Any:
        """What a command of the DevTools protocol answers."""
        return _call("POST", f"{self._url}/goog/cdp/execute", {"cmd": command, "params": parameters})

    def console(self) -> list[str]:
        """What the page logged since the last call."""
        return [entry["message"] for entry in _call("POST", f"{self._url}/se/log", {"type": "browser"})]

    def _keys(self, steps: Sequence[dict[str, str]]) -> None:
        device = {"type": "key", "id": "keyboard", "actions": steps}
        _call("POST", f"{self._url}/actions", {"actions": [device]})


@contextlib.contextmanager
def browser(profile: Path, device: Device) -> Iterator[Browser]:
    """A window of the size of a device, with a profile of its own in the folder ``profile``."""
    options = {
        "binary": shutil.which("chromium"),
        "args": [*(f"--{flag}" for flag in _FLAGS), f"--user-data-dir={profile}"],
        "mobileEmulation": {"deviceMetrics": _DEVICES[device]},
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
