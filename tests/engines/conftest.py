"""Bundles and pipelines that the engine tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engines.bundle import Bundle
from engines.pipeline import Pipeline
from tests.bundles import make_tiny_bundle

KINDS = (("text", "pixel"), ("text", "latent"), ("class", "pixel"), ("class", "latent"))


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Bundle]:
    folder = tmp_path_factory.mktemp("bundles")
    return {(c, s): make_tiny_bundle(folder, c, s, name=f"{c}-{s}") for c, s in KINDS}  # type: ignore[arg-type]


@pytest.fixture(params=KINDS, ids="-".join)
def bundle(request: pytest.FixtureRequest, bundles: dict[tuple[str, str], Bundle]) -> Bundle:
    return bundles[request.param]


@pytest.fixture
def text_bundle(bundles: dict[tuple[str, str], Bundle]) -> Bundle:
    return bundles["text", "latent"]


@pytest.fixture(params=["fake", "ort"])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def pipeline(bundle: Bundle, backend: str) -> Iterator[Pipeline]:
    with Pipeline.open(bundle.path, backend=backend, threads=1, batch_sizes=(1, 2, 4)) as opened:
        yield opened


@pytest.fixture
def text_pipeline(text_bundle: Bundle, backend: str) -> Iterator[Pipeline]:
    with Pipeline.open(text_bundle.path, backend=backend, threads=1, batch_sizes=(1, 2, 4)) as opened:
        yield opened


@pytest.fixture
def bundle_copy(text_bundle: Bundle, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    from shutil import copytree

    return copytree(text_bundle.path, tmp_path / "copy")
