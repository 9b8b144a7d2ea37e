"""The page at / in a browser: the sampler and the method of an edit, where the model offers a choice."""

from __future__ import annotations

from pathlib import Path

from service.app import create_app
from service.settings import Settings
from tests.bundles import make_tiny_bundle
from tests.service import webdriver
from tests.service.helpers import SIZE, listening, png, random_image
from tests.service.webdriver import ANSWERED, READY, Browser

STEPS = "return [...document.querySelectorAll('[name=steps]')].map((one) => one.value)"
FIELDS = ["field-strength", "field-seed", "count", "sampler", "method", "field-source-prompt"]


def test_a_person_chooses_them_and_takes_them_over_from_an_image(
    window: Browser, bundle_path: Path, tmp_path: Path
) -> None:
    make_tiny_bundle(tmp_path, size=SIZE, name="styled", stochastic=(2, 4), encoders=(2,))
    (tmp_path / "input.png").write_bytes(png(random_image(1)))
    with listening(create_app(Settings(bundle=str(bundle_path), models=tmp_path, threads=1))) as port:
        window.go(f"http://127.0.0.1:{port}/")
        window.wait(READY)
        window.js("document.querySelector('[name=task][value=edit]').click()")
        assert _shown(window) == ["field-strength", "field-seed", "count"]
        window.js(
            "const choice = document.querySelector('#models'); choice.value = 'styled';"
            "choice.dispatchEvent(new Event('change'));"
        )
        window.wait("!document.querySelector('#method').hidden")

        window.js("document.querySelector('[name=task][value=generate]').click()")
        window.js("document.querySelector('[name=sampler][value=stochastic]').click()")
        assert window.js(STEPS) == ["4", "8"]
        window.focus("#prompt")
        window.press(*"a red cat")
        _submit(window, images=1)
        assert "Samplerstochastic" in window.text("#facts")

        window.js("document.querySelector('[name=task][value=edit]').click()")
        window.upload("#file", tmp_path / "input.png")
        window.wait("!document.querySelector('#frame').hidden")
        window.js("document.querySelector('[name=method][value=encode]').click()")
        assert window.js(STEPS) == ["2"]
        assert _shown(window) == ["method", "field-source-prompt"]
        window.focus("#submit")
        window.press(webdriver.ENTER)
        window.wait("document.querySelector('#error-source_prompt').textContent")
        assert window.js("return document.activeElement.id") == "source-prompt"
        window.press(*"the moon")
        _submit(window, images=2)
        assert "Methodencode" in window.text("#facts")
        assert "Seed" not in window.text("#facts")
        assert "seed" not in window.js("return document.querySelector('#stage img').alt")
        seed = window.js("return document.querySelector('#seed').value")

        window.js("document.querySelector('[name=method][value=sdedit]').click()")
        window.js("document.querySelector('#source-prompt').value = ''")
        window.js("document.querySelector('#use-settings').click()")
        window.wait("document.querySelector('#source-prompt').value === 'the moon'")
        assert _shown(window) == ["method", "field-source-prompt"]
        assert window.text("#problem") == ""
        assert window.js("return document.querySelector('#seed').value") == seed
        assert window.js("return document.querySelector('#seed-lock').getAttribute('aria-pressed')") == "false"
    assert [line for line in window.console() if "422" not in line] == []


def test_a_class_is_always_chosen(window: Browser, tmp_path: Path) -> None:
    """Also after settings were taken over of an image that came of no other one."""
    styled = make_tiny_bundle(tmp_path, conditioning="class", size=SIZE, name="styled", encoders=(2,))
    with listening(create_app(Settings(bundle=str(styled.path), threads=1))) as port:
        window.go(f"http://127.0.0.1:{port}/")
        window.wait(READY)
        before = window.js("return document.querySelector('#source-class').value")
        _submit(window, images=1)
        window.js("document.querySelector('#use-settings').click()")
        window.wait("document.querySelector('#seed-lock').getAttribute('aria-pressed') === 'true'")
        assert window.js("return document.querySelector('#source-class').value") == before != ""


def _shown(window: Browser) -> list[str]:
    hidden = window.js("return arguments[0].map((id) => document.getElementById(id).hidden)", FIELDS)
    return [name for name, is_hidden in zip(FIELDS, hidden, strict=True) if not is_hidden]


def _submit(window: Browser, images: int) -> None:
    """Submit from the button, and wait until the page has so many images."""
    window.focus("#submit")
    window.press(webdriver.ENTER)
    window.wait(f"document.querySelectorAll('#history-list li').length === {images} && {ANSWERED}")
