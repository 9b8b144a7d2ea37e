"""Bundles that are replaced while they are opened: nothing runs that may be of two revisions."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines import pipeline as pipelines
from engines.backends import Opened
from engines.backends.base import Engine, EngineError
from engines.bundle import Bundle, load_bundle, write_bundle
from engines.pipeline import Pipeline

REPLACED = "the bundle was replaced while it was opened"
Meddle = Callable[[Path, Path], object]


@pytest.fixture
def newer(text_bundle: Bundle, tmp_path: Path) -> Bundle:
    """Another revision, of which the students have changed places: every file has the size that it had."""
    names = {name: name for name in text_bundle.manifest.files} | {
        "step-1.onnx": "step-2.onnx",
        "step-2.onnx": "step-1.onnx",
    }
    files = {name: text_bundle.path / other for name, other in names.items()}
    return write_bundle(tmp_path / "newer", text_bundle.manifest, files)


def rename(live: Path, newer: Path) -> None:
    live.rename(live.with_name("old"))
    newer.rename(live)


def copy_in_place(live: Path, newer: Path) -> None:
    for file in newer.iterdir():
        shutil.copy2(file, live / file.name)


def copy_one_graph(live: Path, newer: Path) -> None:
    shutil.copy2(newer / "step-2.onnx", live / "step-2.onnx")


def remove(live: Path, _: Path) -> None:
    shutil.rmtree(live)


def there_and_back(live: Path, newer: Path) -> None:
    rename(live, newer)
    live.rename(newer)
    live.with_name("old").rename(live)


def meddled(meddle: Callable[[], object], opened: list[Engine], late: bool) -> Callable[..., Opened]:
    """`open_engines`, before or after which somebody meddles with the bundle."""
    opening = pipelines.open_engines

    def open_engines(*arguments: Any) -> Opened:
        if not late:
            meddle()
        found = opening(*arguments)
        opened.extend(found.engines.values())
        if late:
            meddle()
        return found

    return open_engines


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("meddle", [rename, copy_in_place, copy_one_graph, remove, there_and_back])
def test_what_is_replaced_while_it_is_opened_is_refused_and_closed(
    bundle_copy: Path, newer: Bundle, monkeypatch: pytest.MonkeyPatch, meddle: Meddle, late: bool
) -> None:
    opened: list[Engine] = []
    wrapped = meddled(lambda: meddle(bundle_copy, newer.path), opened, late)
    monkeypatch.setattr(pipelines, "open_engines", wrapped)
    with pytest.raises(EngineError, match=REPLACED):
        Pipeline.open(bundle_copy, "ort", threads=1, batch_sizes=(1,))
    for engine in opened:
        with pytest.raises(EngineError, match="closed"):
            engine.warmup((1,))


def test_what_is_replaced_opens_at_the_next_try(
    bundle_copy: Path, newer: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(pipelines, "open_engines", meddled(lambda: rename(bundle_copy, newer.path), [], late=False))
        with pytest.raises(EngineError, match=REPLACED):
            Pipeline.open(bundle_copy, "fake")
    with Pipeline.open(bundle_copy, "fake") as pipeline:
        assert pipeline.manifest == newer.manifest != load_bundle(bundle_copy.with_name("old")).manifest


def test_reading_a_bundle_and_putting_others_beside_it_replaces_nothing(
    bundle_copy: Path, newer: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look_on() -> None:
        load_bundle(bundle_copy)
        shutil.copytree(bundle_copy, bundle_copy.with_name("third"))

    monkeypatch.setattr(pipelines, "open_engines", meddled(look_on, [], late=True))
    Pipeline.open(bundle_copy, "fake").close()
