"""`fewstep data`: what it prints and how it fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from training.data import digits, packages
from training.data.captioned import CaptionedImages
from training.data.commands import data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two good images and a broken one, in class folders."""
    for name, size in (("cat/1.png", (4, 4)), ("dog/1.png", (8, 6)), ("dog/2.png", (4, 4))):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(path)
    (tmp_path / "set/dog/2.png").write_bytes(b"x")
    return tmp_path / "set"


def test_check_prints_counts_and_reasons(folder: Path) -> None:
    result = CliRunner().invoke(data, ["check", str(folder)])
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "train: 2 images, 2 captions",
        "  sizes: 4x4 to 8x6",
        "  groups: cat 1, dog 1",
        "  skipped: 1",
        "    dog/2.png: not an image in a known format",
    ]
    assert CliRunner().invoke(data, ["check", "--strict", str(folder)]).exit_code == 1


def test_check_fails_on_a_folder_without_images(tmp_path: Path) -> None:
    result = CliRunner().invoke(data, ["check", str(tmp_path)])
    assert result.exit_code == 1
    assert "nothing usable in train" in result.output


def test_shards_then_check(folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(data, ["shards", str(folder), str(tmp_path / "out"), "--per-shard", "1"])
    assert result.exit_code == 0, result.output
    assert "dog/2.png: not an image" in result.output
    assert result.output.endswith(f"wrote {tmp_path}/out/train\n")
    assert len(list((tmp_path / "out/train").glob("*.tar"))) == 2
    assert "train: 2 images" in CliRunner().invoke(data, ["check", str(tmp_path / "out")]).output
    again = CliRunner().invoke(data, ["shards", str(folder), str(tmp_path / "out")])
    assert again.exit_code == 1
    assert "exists" in again.output


def test_what_the_system_refuses_is_said_in_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for command in (["digits"], ["shards", str(folder)]):
        result = CliRunner().invoke(data, [*command, str(tmp_path / "file" / "out")])
        assert result.exit_code == 1
        assert isinstance(result.exception, SystemExit)
        assert result.output.splitlines()[-1].startswith("Error: ")


def test_fields_that_no_utf8_can_hold_are_packed_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "set/1.png")
    line = {"file_name": "1.png", "text": "a cat", "source": chr(0xD83D)}
    (tmp_path / "set/metadata.jsonl").write_text(json.dumps(line))
    result = CliRunner().invoke(data, ["shards", str(tmp_path / "set"), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    [record] = CaptionedImages.open(tmp_path / "out").records
    assert record.fields["source"] == chr(0xD83D)


def test_digits_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = digits._native()
    monkeypatch.setattr(digits, "_native", lambda: (images[:20], labels[:20]))
    result = CliRunner().invoke(data, ["digits", str(tmp_path / "out"), "--size", "16"])
    assert result.exit_code == 0, result.output
    assert result.output.endswith("18 train, 2 heldout images of 16 px\n")


def test_emoji_without_npm_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    result = CliRunner().invoke(data, ["emoji", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "npm is needed" in result.output
    assert list(tmp_path.iterdir()) == []
