"""The emoji builder on tiny packages: what it draws, says, holds out and refuses."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from training.data import emoji
from training.data.folder import OutputExistsError
from training.data.packages import DrawingPackage, Package

Packages = tuple[Path, Package, tuple[DrawingPackage, ...]]


def build(out: Path, given: Packages, **options: Any) -> Any:
    folder, words, drawings = given
    return emoji.build(out, packages=folder, words=words, drawings=drawings, **{"size": 16, **options})


def lines(out: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / split / "metadata.jsonl").read_text().splitlines()]


def digest(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_draws_every_pair_but_flags_and_names_what_failed(tmp_path: Path, packages: Packages) -> None:
    said = build(tmp_path / "out", packages)
    records = lines(tmp_path / "out", "train") + lines(tmp_path / "out", "heldout")
    assert len(records) == 4 * 4 - 1
    assert {record["group"] for record in records} == {
        "smileys-emotion",
        "animals-nature",
        "food-drink",
        "travel-places",
    }
    assert len(said["failures"]) == 1
    assert said["failures"][0].startswith("solid 3d 1F697: ")
    assert json.loads((tmp_path / "out/dataset.json").read_text()) == {"format_version": 1, **said}
    assert sum(said["counts"].values()) == len(records)
    assert {source.get("style") for source in said["sources"]} == {"plain", "round", "nameless", "solid 3d", None}


def test_records_have_captions_and_sources(tmp_path: Path, packages: Packages) -> None:
    build(tmp_path / "out", packages)
    records = lines(tmp_path / "out", "train") + lines(tmp_path / "out", "heldout")
    apple = next(r for r in records if r["concept"] == "1F34E" and r["style"] == "solid 3d")
    assert apple["texts"][0] == "a solid 3d icon of a red apple, fruit, red"
    assert {"red apple, solid 3d style", "red apple"} <= set(apple["texts"])
    assert apple["licence"] == "CC-BY-4.0"
    assert apple["source"] == "@set/solid@2.0.0"
    for record in records:
        folder = "train" if (tmp_path / "out/train" / record["file_name"]).is_file() else "heldout"
        with Image.open(tmp_path / "out" / folder / record["file_name"]) as image:
            assert (image.mode, image.size) == ("RGBA", (16, 16))
            low, high = image.getchannel("A").getextrema()
            assert (low, high) == (0, 255)


def test_heldout_pairs_are_never_trained_on_in_a_sister_style(tmp_path: Path, packages: Packages) -> None:
    build(tmp_path / "out", packages)
    families = {"solid 3d": "round"}
    trained, held = (
        {(r["concept"], families.get(r["style"], r["style"])) for r in lines(tmp_path / "out", split)}
        for split in ("train", "heldout")
    )
    assert held
    assert not trained & held


def test_same_arguments_same_bytes_other_seed_other_set(tmp_path: Path, packages: Packages) -> None:
    build(tmp_path / "a", packages)
    build(tmp_path / "b", packages)
    build(tmp_path / "c", packages, seed=7)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    assert digest(tmp_path / "a") != digest(tmp_path / "c")


def test_existing_output_is_kept_unless_overwritten(tmp_path: Path, packages: Packages) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("keep")
    with pytest.raises(OutputExistsError, match="--overwrite"):
        build(tmp_path / "out", packages)
    with pytest.raises(OutputExistsError, match="is not an image set"):
        build(tmp_path / "out", packages, overwrite=True)
    assert (tmp_path / "out/mine.txt").is_file()
    (tmp_path / "out/dataset.json").write_text("{}")
    build(tmp_path / "out", packages, overwrite=True)
    assert not (tmp_path / "out/mine.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_build_that_dies_leaves_nothing(tmp_path: Path, packages: Packages, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(emoji, "_write_split", die)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "out", packages)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_build_are_swept(tmp_path: Path, packages: Packages) -> None:
    (tmp_path / ".out.partial/train").mkdir(parents=True)
    build(tmp_path / "out", packages)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_pins_are_complete() -> None:
    pinned = (emoji.WORDS, *emoji.DRAWINGS)
    assert all(len(package.sha256) == 64 and package.licence and package.author for package in pinned)
    assert len({source.style for source in emoji.DRAWINGS}) == len(emoji.DRAWINGS) >= 5
    assert emoji.DRAWINGS[0].tarball == "iconify-json-noto-1.2.9.tgz"
