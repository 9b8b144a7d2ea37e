"""The MNIST builder on a tiny package: what it writes and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from training.data import mnist
from training.data.captioned import CaptionedImages
from training.data.commands import data
from training.data.digits import captions
from training.data.folder import OutputExistsError
from training.data.mnist import build, read_digits
from training.data.packages import Package, PackageError

PACKAGE = Package("mnist", "0.0.1", "MIT", "Someone", "https://example.org")
PIXELS = 28 * 28
PER_DIGIT = 3
Write = Callable[[Path, Mapping[str, bytes]], None]


def files() -> dict[str, bytes]:
    """Three images of each digit: a grey level of their own each, in 255ths with three decimals, and one white dot."""
    found = {}
    for digit in range(10):
        levels = [round((10 * digit + i) / 255, 3) for i in range(PER_DIGIT)]
        grey = [1.0 if pixel == 0 else level for level in levels for pixel in range(PIXELS)]
        found[f"src/digits/{digit}.json"] = json.dumps({"data": grey}).encode()
    return found


@pytest.fixture
def package(tmp_path: Path, write_tarball: Write) -> Path:
    """The folder of the tarball."""
    folder = tmp_path / "npm"
    folder.mkdir()
    write_tarball(folder / PACKAGE.tarball, files())
    return folder


def test_every_digit_comes_once_white_on_black_with_its_class_and_captions(tmp_path: Path, package: Path) -> None:
    build(tmp_path / "out", package, package=PACKAGE)
    seen = []
    for split, count in (("train", 27), ("heldout", 3)):
        opened = CaptionedImages.open(tmp_path / "out", split, size=28)
        assert len(opened) == count
        assert opened.skipped == ()
        for i, record in enumerate(opened.records):
            image = opened.image(i)
            level = int(image[1, 1, 0])
            digit = level // 10
            assert (image.reshape(-1, 3)[1:] == level).all()
            assert image[0, 0].tolist() == [255, 255, 255]
            assert record.fields["class_name"] == str(digit)
            assert record.texts == captions(digit)
            seen.append(level)
    assert sorted(seen) == [10 * digit + i for digit in range(10) for i in range(PER_DIGIT)]
    with Image.open(min((tmp_path / "out/train").glob("*.png"))) as picture:
        assert (picture.mode, picture.size) == ("RGB", (28, 28))


def test_the_description_names_source_licence_and_counts(tmp_path: Path, package: Path) -> None:
    said = build(tmp_path / "out", package, package=PACKAGE)
    assert json.loads((tmp_path / "out/dataset.json").read_text()) == {"format_version": 1, **said}
    (source,) = said["sources"]
    assert (source["name"], source["version"], source["licence"]) == ("mnist", "0.0.1", "MIT")
    assert said["counts"] == {"train": 27, "heldout": 3}
    assert said["classes"] == {str(digit): PER_DIGIT for digit in range(10)}
    assert "# MNIST digits" in (tmp_path / "out/README.md").read_text()


def test_labels_follow_the_files(package: Path) -> None:
    images, labels = read_digits(package / PACKAGE.tarball)
    assert images.shape == (30, 28, 28)
    assert labels.tolist() == list(np.repeat(range(10), PER_DIGIT))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"data": [0.5] * 100}, "no images of 28 x 28"),
        ({"data": [2.0] * PIXELS}, "outside"),
        ({"data": [float("nan")] * PIXELS}, "outside"),
        ({"data": []}, "no grey levels"),
        ({"data": "white"}, "no images"),
        ({}, "no images"),
        ([], "no images"),
    ],
)
def test_a_file_that_is_no_digits_is_named(tmp_path: Path, write_tarball: Write, content: object, said: str) -> None:
    write_tarball(tmp_path / PACKAGE.tarball, files() | {"src/digits/4.json": json.dumps(content).encode()})
    with pytest.raises(PackageError, match=rf"src/digits/4\.json .*{said}"):
        build(tmp_path / "out", tmp_path, package=PACKAGE)
    assert not (tmp_path / "out").exists()


def test_an_existing_set_is_kept_unless_overwritten(tmp_path: Path, package: Path) -> None:
    build(tmp_path / "out", package, package=PACKAGE)
    with pytest.raises(OutputExistsError, match="--overwrite"):
        build(tmp_path / "out", package, package=PACKAGE)
    build(tmp_path / "out", package, overwrite=True, package=PACKAGE)


def test_the_command_refuses_a_package_that_is_not_the_pinned_one(tmp_path: Path, write_tarball: Write) -> None:
    write_tarball(tmp_path / mnist.PACKAGE.tarball, files())
    result = CliRunner().invoke(data, ["mnist", str(tmp_path / "out"), "--packages", str(tmp_path)])
    assert result.exit_code == 1
    assert "does not match the pinned SHA-256" in result.output
    assert result.output.count("\n") == 1
