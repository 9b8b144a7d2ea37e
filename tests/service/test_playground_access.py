"""The page at / for whoever uses it, on a desktop and on a phone: sizes, contrast, order of focus, motion."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from service.app import create_app
from service.settings import Settings
from tests.service import webdriver
from tests.service.helpers import listening, png, random_image
from tests.service.webdriver import ANSWERED, READY, Browser

TEXT_CONTRAST = 4.5
"""WCAG 2.2, 1.4.3."""
EDGE_CONTRAST = 3.0
"""WCAG 2.2, 1.4.11: of what shows where a control is."""
TARGET_PX = 44
"""WCAG 2.2, 2.5.5: of what is touched."""

# Relative luminance and ratio as WCAG defines them; of what can be seen, and is not disabled.
CONTRASTS = """
    const numbers = (css) => css.match(/[\\d.]+/g).map(Number);
    const linear = (value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4);
    const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
    const ratio = (one, other) => {
        const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
        return (high + 0.05) / (low + 0.05);
    };
    const backdrop = (element) => {
        for (let at = element; at; at = at.parentElement) {
            const [r, g, b, alpha = 1] = numbers(getComputedStyle(at).backgroundColor);
            if (alpha === 1) return [r, g, b];
        }
        return [255, 255, 255];
    };
    const seen = (element) => element.checkVisibility({ visibilityProperty: true }) && !element.closest(
        ":disabled, .visually-hidden, option");
    const name = (element) => `${element.tagName}#${element.closest("[id]")?.id}`;
    const texts = [], edges = [];
    for (const element of [...document.body.querySelectorAll("*")].filter(seen)) {
        const style = getComputedStyle(element);
        const hasText = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
        if (hasText) texts.push([name(element), ratio(numbers(style.color), backdrop(element))]);
        if (element.placeholder) {
            const colour = getComputedStyle(element, "::placeholder").color;
            texts.push([`${name(element)}::placeholder`, ratio(numbers(colour), backdrop(element))]);
        }
        if (!element.matches(".button:not(.quiet), textarea, select, input[type=text], .segments span")) continue;
        edges.push([name(element), ratio(numbers(style.borderTopColor), backdrop(element.parentElement))]);
    }
    return { texts, edges };
"""
SMALL_TARGETS = """
    const controls = [...document.querySelectorAll("button, a, select, textarea, input, label.button")];
    return controls
        .map((control) => control.matches("label input:not([type=text])") ? control.closest("label") : control)
        .filter((control) => control.checkVisibility() && !control.matches(".visually-hidden"))
        .map((control) => [control.outerHTML.slice(0, 80), control.getBoundingClientRect()])
        .filter(([, box]) => Math.round(Math.min(box.width, box.height)) < arguments[0])
        .map(([name, box]) => `${name} ${box.width} x ${box.height}`);
"""


@pytest.fixture
def page(any_window: Browser, bundle_path: Path) -> Iterator[Browser]:
    """The page, ready."""
    with listening(create_app(Settings(bundle=str(bundle_path), threads=1))) as port:
        any_window.go(f"http://127.0.0.1:{port}/")
        any_window.wait(READY)
        yield any_window


def test_everything_can_be_read_and_touched_in_every_state(page: Browser, tmp_path: Path) -> None:
    (tmp_path / "made.png").write_bytes(png(random_image()))
    _assert_good(page, "at the start")
    page.js("document.querySelector('[name=count][value=\"4\"]').click()")
    page.js("document.querySelector('#prompt').value = 'a red cat'")
    page.js("document.querySelector('#submit').click()")
    page.wait(ANSWERED)
    _assert_good(page, "with several images")
    page.upload("#file", tmp_path / "made.png")
    page.wait("!document.querySelector('#frame').hidden")
    page.js("document.querySelector('[name=task][value=inpaint]').click()")
    page.focus("#mask")
    page.press(webdriver.SPACE)
    page.js("document.querySelector('#submit').click()")
    page.wait(f"document.querySelectorAll('#history-list li').length === 8 && {ANSWERED}")
    _assert_good(page, "with a mask, before and after side by side")
    page.js("document.querySelector('[name=way][value=slide]').click()")
    page.js("document.querySelector('#guidance-value').value = 99; document.querySelector('#submit').click()")
    page.wait("document.querySelector('#error-guidance_scale').textContent")
    _assert_good(page, "with an error")


def test_the_focus_goes_the_way_the_eye_does_and_is_seen(page: Browser) -> None:
    page.focus("#prompt")
    order = []
    for _ in range(9):
        page.press(webdriver.TAB)
        order.append(page.js("const at = document.activeElement; return at.name || at.id"))
        assert page.js(
            "const at = document.activeElement; const shown = at.nextElementSibling?.matches('span') ? "
            "at.nextElementSibling : at; return getComputedStyle(shown).outlineStyle"
        ) not in ("none", "")
    assert order == [
        "steps",
        "guidance-value",
        "guidance",
        "seed",
        "seed-dice",
        "seed-lock",
        "count",
        "with-prompt",
        "submit",
    ]


def test_nothing_moves_for_who_wants_no_motion(page: Browser) -> None:
    motion = """
        return [getComputedStyle(document.documentElement).scrollBehavior,
            getComputedStyle(document.querySelector("#image")).transitionDuration,
            getComputedStyle(document.querySelector("#progress"), "::after").animationName];
    """
    page.js("document.querySelector('#progress').hidden = false")
    page.emulate(prefers_reduced_motion="no-preference")
    assert page.js(motion) == ["smooth", "0.15s", "pass"]
    page.emulate(prefers_reduced_motion="reduce")
    assert page.js(motion) == ["auto", "0s", "none"]


def _assert_good(page: Browser, state: str) -> None:
    assert page.js("return document.documentElement.scrollWidth - innerWidth") <= 0, state
    if page.js("return matchMedia('(pointer: coarse)').matches"):
        assert page.js(SMALL_TARGETS, TARGET_PX) == [], state
    for scheme in ("light", "dark"):
        page.emulate(prefers_color_scheme=scheme)
        found = page.js(CONTRASTS)
        assert len(found["texts"]) > 10
        assert [pair for pair in found["texts"] if pair[1] < TEXT_CONTRAST] == [], (state, scheme)
        assert [pair for pair in found["edges"] if pair[1] < EDGE_CONTRAST] == [], (state, scheme)
