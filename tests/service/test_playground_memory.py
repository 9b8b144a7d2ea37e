"""The page at / in a browser: what it keeps from visit to visit, and what it reads from image files."""

from __future__ import annotations

from pathlib import Path

import httpx
import numpy as np
import pytest

from service.app import create_app
from service.settings import Settings
from tests.service import webdriver
from tests.service.helpers import SIZE, listening, png, random_image, read_pixels
from tests.service.webdriver import ANSWERED, READY, Browser

MADE = {"prompt": "a red cat", "steps": 2, "guidance_scale": 2.345, "seed": 7}
FORM = """
    const value = (selector) => document.querySelector(selector).value;
    return {
        prompt: value("#prompt"),
        steps: Number(value("[name=steps]:checked")),
        guidance_scale: Number(value("#guidance-value")),
        seed: Number(value("#seed")),
    };
"""


@pytest.fixture
def settings(bundle_path: Path) -> Settings:
    return Settings(bundle=str(bundle_path), threads=1)


def test_the_history_outlives_the_page_until_it_is_cleared(window: Browser, settings: Settings) -> None:
    with listening(create_app(settings)) as port:
        _open(window, port)
        for k in range(2):
            window.js("document.querySelector('#prompt').value = arguments[0]", "a red cat " * (k + 1))
            _submit(window, k + 1)
        shown = window.text("#facts")
        _open(window, port)
        window.wait("document.querySelectorAll('#history-list li').length === 2")
        assert window.text("#facts") == shown
        window.focus("#history-clear")
        window.press(webdriver.ENTER)
        assert window.js("return document.querySelector('#history').hidden")
        assert window.js("return document.activeElement.id") == "use-as-input"
        _open(window, port)
        window.js("document.querySelector('#prompt').value = 'a blue cat'")
        _submit(window, 1)
    assert window.console() == []


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_an_image_made_here_gives_its_settings_back(
    window: Browser, settings: Settings, tmp_path: Path, kind: str
) -> None:
    file = tmp_path / f"made.{kind}"
    with listening(create_app(settings)) as port:
        service = f"http://127.0.0.1:{port}"
        answer = httpx.post(
            f"{service}/generate", json=MADE | {"metadata": "full"}, headers={"Accept": f"image/{kind}"}, timeout=60
        )
        file.write_bytes(answer.raise_for_status().content)
        _open(window, port)
        window.upload("#file", file)
        window.wait("!document.querySelector('#field-reuse').hidden")
        assert window.text("#reuse-note").endswith(": 2 steps, guidance 2.345, seed 7.")
        window.focus("#reuse")
        window.press(webdriver.ENTER)
        window.wait("document.querySelector('#prompt').value")
        assert window.js(FORM) == MADE
        assert window.js("return document.activeElement.id") == "submit"
        assert window.js("return document.querySelector('[name=task]:checked').value") == "generate"
        assert window.text("#problem") == ""
        if kind == "png":
            _submit(window, 1)
            made = np.array(window.rgba("#image", SIZE)).reshape(SIZE, SIZE, 4)
            assert np.array_equal(made[..., :3], read_pixels(file.read_bytes()))


def test_what_a_file_does_not_tell_or_the_model_cannot_do_is_said(
    window: Browser, settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "other.png").write_bytes(png(random_image()))
    with listening(create_app(settings)) as port:
        answer = httpx.post(
            f"http://127.0.0.1:{port}/generate", json=MADE, headers={"Accept": "image/jpeg"}, timeout=60
        )
        told = answer.raise_for_status().content
        (tmp_path / "silent.jpg").write_bytes(told.replace(b'\\"steps\\": 2', b'\\"steps\\": 3'))
        _open(window, port)
        window.upload("#file", tmp_path / "silent.jpg")
        window.wait("!document.querySelector('#field-reuse').hidden")
        window.js("document.querySelector('#reuse').click()")
        window.wait("document.querySelector('#problem').textContent")
        assert window.text("#problem") == "Taken over, but for 3 steps, its prompt, which the file does not tell."
        window.upload("#file", tmp_path / "other.png")
        window.wait("document.querySelector('#image-note').textContent.startsWith('other.png')")
        assert window.js("return document.querySelector('#field-reuse').hidden")


def test_an_image_of_the_history_gives_back_its_input_and_its_mask_too(
    window: Browser, settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "input.png").write_bytes(png(random_image()))
    with listening(create_app(settings)) as port:
        _open(window, port)
        window.js("document.querySelector('[name=task][value=inpaint]').click()")
        window.js("document.querySelector('#prompt').value = 'a red cat'")
        window.upload("#file", tmp_path / "input.png")
        window.wait("!document.querySelector('#frame').hidden")
        window.focus("#mask")
        window.press(webdriver.SPACE)
        coverage = window.text("#mask-coverage")
        _submit(window, 1)
        made = window.js(FORM)

        window.js("document.querySelector('#prompt').value = 'something else'")
        window.js("document.querySelector('#mask-clear').click()")
        window.js("document.querySelector('#image-remove').click()")
        window.js("document.querySelector('[name=task][value=generate]').click()")
        _open(window, port)
        window.wait("document.querySelectorAll('#history-list li').length === 1")
        window.focus("#use-settings")
        window.press(webdriver.ENTER)
        window.wait("document.querySelector('#mask-coverage').textContent.endsWith('will be repainted.')")
        assert window.text("#mask-coverage") == coverage
        assert window.js(FORM) == made
        assert window.js("return document.querySelector('[name=task]:checked').value") == "inpaint"
        first = window.rgba("#image", SIZE)
        _submit(window, 2)
        assert window.rgba("#image", SIZE) == first
    assert window.console() == []


def _open(window: Browser, port: int) -> None:
    window.go(f"http://127.0.0.1:{port}/")
    window.wait(READY)


def _submit(window: Browser, images: int) -> None:
    """Submit, and wait until the history has so many images."""
    window.focus("#submit")
    window.press(webdriver.ENTER)
    window.wait(f"document.querySelectorAll('#history-list li').length === {images} && {ANSWERED}")
