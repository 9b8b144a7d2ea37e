"""The page at /: its files hold together under a strict policy."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

import service
from service.app import create_app
from service.schemas import EditRequest, InpaintRequest
from service.settings import Settings

FOLDER = Path(service.__file__).parent / "playground"
FILES = sorted(FOLDER.iterdir())
SCRIPTS = [path for path in FILES if path.suffix == ".js"]
NAMESPACE = "http://www.w3.org/2000/svg"
CONTROLS = {"input", "select", "textarea"}


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
    models = (EditRequest, InpaintRequest)
    fields = {field.alias or name for model in models for name, field in model.model_fields.items()}
    assert places - {"key"} <= fields
    assert places == {
        "key",
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
