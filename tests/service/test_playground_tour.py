"""The page at / in a browser: a whole tour of it, by keyboard where a keyboard can do it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np

from engines.bundle import load_bundle, write_bundle
from service.app import create_app
from service.security.api_keys import ApiKey, digest_of, new_key
from service.settings import Settings
from tests.service import webdriver
from tests.service.helpers import SIZE, Pixels, listening, png, random_image, read_pixels
from tests.service.webdriver import ANSWERED, READY


def test_a_person_generates_edits_and_repaints_by_keyboard(
    window: webdriver.Browser, bundle_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "wide.png").write_bytes(png(random_image(1, (48, 24))))
    with listening(create_app(Settings(bundle=str(bundle_path), threads=1))) as port:
        window.go(f"http://127.0.0.1:{port}/")
        window.wait(READY)

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
        window.js("""
            const press = (key, more) => document.querySelector("#mask").dispatchEvent(
                new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true, ...more }));
            press("Z", { ctrlKey: true, shiftKey: true });
            press("Enter"); press("Enter", { repeat: true }); press("ArrowUp"); press("Enter");
        """)
        assert window.text("#mask-coverage") not in (coverage, "Paint over what should change.")
        window.chord(webdriver.CONTROL, "z")
        assert window.text("#mask-coverage") == coverage, "redo undoes nothing, and a key that is held is one press"
        window.press("e", webdriver.SPACE)
        assert window.text("#mask-coverage") != coverage
        window.chord(webdriver.CONTROL, "z")
        assert window.text("#mask-coverage") == coverage
        _assert_only_the_first_finger_paints(window)
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
        window.wait(READY)
        window.js("document.querySelector('[name=count][value=\"4\"]').click()")
        window.focus("#prompt")
        window.press(*"it's a red cat", webdriver.ENTER)
        window.wait("document.querySelectorAll('#history-list li').length === 4")
        assert window.js("return document.querySelector('#field-compare').hidden")
        window.js("document.querySelectorAll('#picker-list button')[2].click()")
        seed = int(window.js("return document.querySelector('#seed').value"))
        assert window.text("#facts").startswith(f"Promptit's a red catSeed{seed + 2} ")

        window.js("navigator.clipboard.writeText = async (text) => { window.copied = text; };")
        window.js("document.querySelector('#copy-curl').click()")
        window.wait("window.copied")
        subprocess.run(["bash", "-c", window.js("return window.copied")], cwd=tmp_path, check=True, timeout=60)
        (made,) = tmp_path.glob("*.png")
        assert np.array_equal(read_pixels(made.read_bytes()), _pixels(window, "#image")[..., :3])

        window.js("navigator.clipboard.writeText = () => Promise.reject(new Error('not allowed'));")
        window.js("document.querySelector('#copy-curl').click()")
        window.wait("!document.querySelector('#command').hidden")
        assert window.js("return getSelection().toString()") == window.js("return window.copied")

        window.js("document.querySelector('#use-as-input').click()")
        window.wait("!document.querySelector('#frame').hidden")
        window.js("document.querySelector('[name=count][value=\"1\"]').click()")
        _submit(window, images=5)
        assert not window.js("return document.querySelector('#before').hidden")
        assert np.array_equal(_pixels(window, "#before"), _pixels(window, "#source"))
        left, right = (
            window.js("return document.querySelector(arguments[0]).getBoundingClientRect().x", selector)
            for selector in ("#before", "#image")
        )
        assert left < right
        window.js("document.querySelector('[name=way][value=slide]').click()")
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


def _submit(window: webdriver.Browser, images: int) -> None:
    """Submit from the button, and wait until the page has so many images."""
    window.focus("#submit")
    window.press(webdriver.ENTER)
    window.wait(f"document.querySelectorAll('#history-list li').length === {images} && {ANSWERED}")


def _assert_only_the_first_finger_paints(window: webdriver.Browser) -> None:
    """And a stroke that is undone while it goes on has ended: nothing of it is left."""
    window.press("e")  # paints again
    painted = window.text("#mask-coverage")
    window.js(
        """
        const canvas = document.querySelector("#mask"), box = canvas.getBoundingClientRect();
        canvas.setPointerCapture = () => {};
        const touch = (type, pointerId, x, y) => canvas.dispatchEvent(new PointerEvent(type, {
          pointerId, isPrimary: pointerId === 2, pointerType: "touch", bubbles: true,
          clientX: box.left + x * box.width, clientY: box.top + y * box.height,
        }));
        touch("pointerdown", 2, 0.1, 0.9);
        touch("pointerdown", 3, 0.9, 0.1);
        window.before = document.querySelector("#mask-coverage").textContent;
        touch("pointermove", 3, 0.9, 0.9);
        touch("pointerup", 3, 0.9, 0.9);
        window.after = document.querySelector("#mask-coverage").textContent;
        touch("pointermove", 2, 0.3, 0.9);
        canvas.dispatchEvent(new KeyboardEvent("keydown", { key: "z", ctrlKey: true, bubbles: true }));
        touch("pointermove", 2, 0.9, 0.9);
        touch("pointerup", 2, 0.9, 0.9);
        """
    )
    assert window.js("return window.before") == window.js("return window.after") != painted
    assert window.text("#mask-coverage") == painted


def _assert_only_the_mask_changed(window: webdriver.Browser) -> None:
    before, after, mask = (_pixels(window, selector) for selector in ("#source", "#image", "#mask"))
    painted = mask[..., 3] > 0
    assert painted.any()
    assert not painted.all()
    assert np.array_equal(before[~painted], after[~painted])
    assert not np.array_equal(before[painted], after[painted])


def _pixels(window: webdriver.Browser, selector: str) -> Pixels:
    """RGBA of an image or canvas in the page, (16, 16, 4)."""
    return np.array(window.rgba(selector, SIZE), dtype=np.uint8).reshape(SIZE, SIZE, 4)


def test_a_connection_that_breaks_once_is_no_end(window: webdriver.Browser, bundle_path: Path) -> None:
    breaking = """
        const real = window.fetch;
        window.fetch = (url, options) => {
            if (!String(url).endsWith("/models") || window.broken) return real(url, options);
            window.broken = true;
            return Promise.reject(new TypeError("broken"));
        };
    """
    script = window.devtools("Page.addScriptToEvaluateOnNewDocument", source=breaking)
    try:
        with listening(create_app(Settings(bundle=str(bundle_path), threads=1))) as port:
            window.go(f"http://127.0.0.1:{port}/")
            window.wait(READY)
            assert window.js("return window.broken")
    finally:
        window.devtools("Page.removeScriptToEvaluateOnNewDocument", **script)


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
        window.wait(READY)
        assert window.js("return document.querySelector('#field-key').hidden")
        window.focus("#prompt")
        window.press(*"a red cat", webdriver.ENTER)
        window.wait(ANSWERED)
        window.js("navigator.clipboard.writeText = (text) => { window.copied = text; return Promise.resolve(); }")
        window.js("document.querySelector('#copy-curl').click()")
        copied = window.js("return window.copied")
        assert "Bearer ${FEWSTEP_KEY:?" in copied
        assert key not in copied
        assert window.js("return [localStorage.length, document.cookie]") == [0, ""]
    assert [line for line in window.console() if "401" not in line] == []
