"""The page at /: its files hold together under a strict policy, and a browser can do the whole tour."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient

import service
from engines.bundle import load_bundle, write_bundle
from service.api_keys import ApiKey, digest_of, new_key
from service.app import create_app
from service.schemas import EditRequest, InpaintRequest
from service.settings import Settings
from tests.bundles import make_tiny_bundle
from tests.service import webdriver
from tests.service.helpers import Pixels, listening, png, random_image, read_pixels

FOLDER = Path(service.__file__).parent / "playground"
FILES = sorted(FOLDER.iterdir())
SCRIPTS = [path for path in FILES if path.suffix == ".js"]
NAMESPACE = "http://www.w3.org/2000/svg"
CONTROLS = {"input", "select", "textarea"}
ANSWERED = "!document.querySelector('#image').hidden && document.querySelector('#progress').hidden"


class Page(HTMLParser):
    """Every element of index.html with its attributes; the text of its scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.inline = ""
        self._open: list[str] = []
        self.labelled_by_parent: list[dict[str, str]] = []
        self.feed((FOLDER / "index.html").read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self.elements.append((tag, attributes))
        if tag in CONTROLS and "label" in self._open:
            self.labelled_by_parent.append(attributes)
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in {"script", "style"}:
            self.inline += data.strip()

    def values(self, name: str) -> list[str]:
        return [attributes[name] for _, attributes in self.elements if name in attributes]


@pytest.fixture(scope="module")
def page() -> Page:
    return Page()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_asks_nothing_of_other_hosts(path: Path) -> None:
    text = path.read_text(encoding="utf-8").replace(NAMESPACE, "")
    assert not re.search(r"""https?:|wss?:|["'(=]\s*//|@import|url\(""", text)


def test_nothing_inline_that_the_policy_would_refuse(page: Page) -> None:
    assert page.inline == ""
    names = {name for _, attributes in page.elements for name in attributes}
    assert "style" not in names
    assert not [name for name in names if name.startswith("on")]
    assert not [tag for tag, _ in page.elements if tag == "style"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_small_and_makes_no_code_or_markup_from_text(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 250
    assert not re.search(r"\b(eval|Function|innerHTML|outerHTML|insertAdjacentHTML|cssText)\b", text)
    assert 'setAttribute("style"' not in text


def test_the_page_and_its_modules_refer_to_files_that_exist(page: Page) -> None:
    links = [value for name in ("src", "href") for value in page.values(name)]
    assert links
    assert all((FOLDER.parent / link).is_file() for link in links)
    for path in SCRIPTS:
        for name in re.findall(r'from "\./([^"]+)"', path.read_text(encoding="utf-8")):
            assert (FOLDER / name).is_file(), (path.name, name)


def test_ids_are_unique_and_those_referred_to_exist(page: Page) -> None:
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    references = {"for", "aria-describedby", "aria-labelledby"}
    wanted = [word for name in references for value in page.values(name) for word in value.split()]
    for path in SCRIPTS:
        wanted += re.findall(r"""(?:byId|this\.#button)\("([^"]+)"\)""", path.read_text(encoding="utf-8"))
    assert not set(wanted) - set(ids)


def test_every_control_has_a_label(page: Page) -> None:
    labelled = set(page.values("for"))
    for tag, attributes in page.elements:
        if tag in CONTROLS:
            named = attributes.get("id") in labelled or "aria-label" in attributes
            assert named or attributes in page.labelled_by_parent, attributes


def test_every_field_that_the_page_sends_has_a_place_for_its_error(page: Page) -> None:
    places = {value.removeprefix("error-") for value in page.values("id") if value.startswith("error-")}
    fields = {
        field.alias or name for model in (EditRequest, InpaintRequest) for name, field in model.model_fields.items()
    }
    assert places <= fields
    assert places == {
        *("prompt", "class", "image", "mask", "strength", "steps", "guidance_scale", "seed", "n"),
        *("sampler", "method", "source_prompt", "source_class"),
    }


def test_the_service_gives_the_page_and_its_files_under_the_policy(settings: Settings) -> None:
    types = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
    with TestClient(create_app(settings)) as client:
        for path in FILES:
            address = "/" if path.name == "index.html" else f"/playground/{path.name}"
            answer = client.get(address)
            assert answer.content == path.read_bytes()
            assert answer.headers["content-type"].split(";")[0] == types[path.suffix]
            assert "default-src 'self'" in answer.headers["content-security-policy"]
            assert "unsafe" not in answer.headers["content-security-policy"]


@pytest.fixture
def window(tmp_path: Path) -> Iterator[webdriver.Browser]:
    if missing := webdriver.missing_programs():
        pytest.skip(f"the browser test needs {' and '.join(missing)} (Debian: chromium, chromium-driver)")
    with webdriver.browser(tmp_path / "profile") as window:
        yield window


def test_a_person_generates_edits_and_repaints_by_keyboard(
    window: webdriver.Browser, bundle_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "wide.png").write_bytes(png(random_image(1, (48, 24))))
    with listening(create_app(Settings(bundle=str(bundle_path), threads=1))) as port:
        window.go(f"http://127.0.0.1:{port}/")
        window.wait("document.querySelector('#state').dataset.state === 'ready'")

        window.focus("#prompt")
        window.press(*"a red cat", webdriver.ENTER)
        window.wait(ANSWERED)
        assert f"Seed{window.js('return document.querySelector(`#seed`).value')} " in window.text("#facts")
        assert all(name in window.text("#timings") for name in ("Queue", "Denoise", "Total", "Round trip"))

        window.js("document.querySelector('[name=task][value=edit]').click()")
        window.upload("#file", tmp_path / "wide.png")
        window.wait("!document.querySelector('#frame').hidden")
        assert window.text("#image-note") == "wide.png, 48 × 24 to 16 × 16, centre cropped"
        _submit(window, images=2)
        assert "Strength" in window.text("#facts")

        window.js("document.querySelector('[name=task][value=inpaint]').click()")
        window.focus("#mask")
        window.press(webdriver.RIGHT, webdriver.RIGHT, webdriver.DOWN, "]", webdriver.SPACE)
        coverage = window.text("#mask-coverage")
        assert coverage.endswith("% will be repainted.")
        window.press(webdriver.RIGHT, webdriver.RIGHT, webdriver.SPACE)
        assert window.text("#mask-coverage") != coverage
        window.chord(webdriver.CONTROL, "z")
        assert window.text("#mask-coverage") == coverage
        _submit(window, images=3)
        _assert_only_the_mask_changed(window)

        window.js("document.querySelector('#guidance-value').value = 99")
        window.focus("#prompt")
        window.press(webdriver.ENTER)
        window.wait("document.querySelector('#error-guidance_scale').textContent")
        assert window.js("return document.activeElement.id") == "guidance-value"
    # The browser itself reports the 422; anything else would be a fault of the page.
    assert [line for line in window.console() if "422" not in line] == []


def test_a_person_picks_of_several_compares_with_the_input_and_copies_the_command(
    window: webdriver.Browser, bundle_path: Path, class_bundle_path: Path, tmp_path: Path
) -> None:
    shutil.copytree(class_bundle_path, tmp_path / "models" / "classes")
    renamed = load_bundle(class_bundle_path)
    files = {name: renamed.path / name for name in renamed.manifest.files}
    description = renamed.manifest.model_copy(update={"name": "classes"})
    write_bundle(tmp_path / "models" / "classes", description, files, replace=True)
    settings = Settings(bundle=str(bundle_path), models=tmp_path / "models", threads=1)
    with listening(create_app(settings)) as port:
        window.go(f"http://127.0.0.1:{port}/")
        window.wait("document.querySelector('#state').dataset.state === 'ready'")
        window.js("document.querySelector('[name=count][value=\"4\"]').click()")
        window.focus("#prompt")
        window.press(*"it's a red cat", webdriver.ENTER)
        window.wait("document.querySelectorAll('#history-list li').length === 4")
        assert window.js("return document.querySelector('#field-compare').hidden")
        window.js("document.querySelectorAll('#history-list button')[2].click()")
        seed = int(window.js("return document.querySelector('#seed').value"))
        assert window.text("#facts").startswith(f"Promptit's a red catSeed{seed + 2} ")

        window.js("navigator.clipboard.writeText = async (text) => { window.copied = text; };")
        window.js("document.querySelector('#copy-curl').click()")
        window.wait("window.copied")
        subprocess.run(["bash", "-c", window.js("return window.copied")], cwd=tmp_path, check=True, timeout=30)
        (made,) = tmp_path.glob("*.png")
        assert np.array_equal(read_pixels(made.read_bytes()), _pixels(window, "#image")[..., :3])

        window.js("document.querySelector('#use-as-input').click()")
        window.wait("!document.querySelector('#frame').hidden")
        window.js("document.querySelector('[name=count][value=\"1\"]').click()")
        _submit(window, images=5)
        assert not window.js("return document.querySelector('#before').hidden")
        assert np.array_equal(_pixels(window, "#before"), _pixels(window, "#source"))
        window.js(
            "const slider = document.querySelector('#compare'); slider.value = 40;"
            "slider.dispatchEvent(new Event('input'));"
        )
        clip = window.js("return getComputedStyle(document.querySelector('#before')).clipPath")
        assert "60%" in clip

        window.js(
            "const choice = document.querySelector('#models'); choice.value = 'classes';"
            "choice.dispatchEvent(new Event('change'));"
        )
        window.wait("!document.querySelector('#field-class').hidden")
        window.js("document.querySelector('[name=task][value=generate]').click()")
        _submit(window, images=6)
        assert "Class" in window.text("#facts")
    assert window.console() == []


def test_a_person_chooses_the_sampler_and_edits_by_encoding_where_the_model_offers_it(
    window: webdriver.Browser, bundle_path: Path, tmp_path: Path
) -> None:
    make_tiny_bundle(tmp_path, size=16, name="styled", stochastic=(2, 4), encoders=(2,))
    (tmp_path / "input.png").write_bytes(png(random_image(1)))
    with listening(create_app(Settings(bundle=str(bundle_path), models=tmp_path, threads=1))) as port:
        window.go(f"http://127.0.0.1:{port}/")
        window.wait("document.querySelector('#state').dataset.state === 'ready'")
        window.js("document.querySelector('[name=task][value=edit]').click()")
        assert window.js("return [...document.querySelectorAll('#sampler, #method')].every((one) => one.hidden)")
        window.js(
            "const choice = document.querySelector('#models'); choice.value = 'styled';"
            "choice.dispatchEvent(new Event('change'));"
        )
        window.wait("!document.querySelector('#method').hidden")

        window.js("document.querySelector('[name=task][value=generate]').click()")
        window.js("document.querySelector('[name=sampler][value=stochastic]').click()")
        steps = "return [...document.querySelectorAll('[name=steps]')].map((one) => one.value)"
        assert window.js(steps) == ["4", "8"]
        window.focus("#prompt")
        window.press(*"a red cat", webdriver.ENTER)
        window.wait(ANSWERED)
        assert "Samplerstochastic" in window.text("#facts")

        window.js("document.querySelector('[name=task][value=edit]').click()")
        window.upload("#file", tmp_path / "input.png")
        window.wait("!document.querySelector('#frame').hidden")
        window.js("document.querySelector('[name=method][value=encode]').click()")
        assert window.js(steps) == ["2"]
        hidden = "return ['field-strength', 'field-seed', 'sampler'].map((id) => document.getElementById(id).hidden)"
        assert window.js(hidden) == [True, True, True]
        window.focus("#source-prompt")
        window.press(*"the moon")
        _submit(window, images=2)
        assert "Methodencode" in window.text("#facts")
    assert window.console() == []


def _submit(window: webdriver.Browser, images: int) -> None:
    """Submit from the button, and wait until the page has so many images."""
    window.focus("#submit")
    window.press(webdriver.ENTER)
    window.wait(f"document.querySelectorAll('#history-list li').length === {images} && {ANSWERED}")


def _assert_only_the_mask_changed(window: webdriver.Browser) -> None:
    before, after, mask = (_pixels(window, selector) for selector in ("#source", "#image", "#mask"))
    painted = mask[..., 3] > 0
    assert painted.any()
    assert not painted.all()
    assert np.array_equal(before[~painted], after[~painted])
    assert not np.array_equal(before[painted], after[painted])


def _pixels(window: webdriver.Browser, selector: str) -> Pixels:
    """RGBA of an image or canvas in the page, (16, 16, 4)."""
    script = """
        const picture = document.querySelector(arguments[0]);
        const canvas = new OffscreenCanvas(16, 16);
        canvas.getContext("2d").drawImage(picture, 0, 0);
        return [...canvas.getContext("2d").getImageData(0, 0, 16, 16).data];
    """
    return np.array(window.js(script, selector), dtype=np.uint8).reshape(16, 16, 4)


def test_a_person_gives_the_key_that_a_service_asks_for(
    window: webdriver.Browser, bundle_path: Path, tmp_path: Path
) -> None:
    key = new_key()
    (tmp_path / "keys").write_text(ApiKey("ann", digest_of(key)).line)
    locked = Settings(bundle=str(bundle_path), threads=1, api_keys_file=tmp_path / "keys")
    with listening(create_app(locked)) as port:
        window.go(f"http://127.0.0.1:{port}/")
        window.wait("document.activeElement.id === 'key'")
        assert window.text("#problem").startswith("An API key is needed.")
        window.press(*"a wrong key", webdriver.ENTER)
        window.wait("document.querySelector('#problem').textContent.startsWith('This API key is not known.')")
        window.press(*key)
        window.focus("#key-use")
        window.press(webdriver.ENTER)
        window.wait("document.querySelector('#state').dataset.state === 'ready'")
        assert window.js("return document.querySelector('#field-key').hidden")
        window.focus("#prompt")
        window.press(*"a red cat", webdriver.ENTER)
        window.wait(ANSWERED)
        window.js("navigator.clipboard.writeText = (text) => { window.copied = text; return Promise.resolve(); }")
        window.js("document.querySelector('#copy-curl').click()")
        copied = window.js("return window.copied")
        assert "Bearer $FEWSTEP_KEY" in copied
        assert key not in copied
        assert window.js("return [localStorage.length, document.cookie]") == [0, ""]
    assert [line for line in window.console() if "401" not in line] == []
