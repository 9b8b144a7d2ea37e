"""The emoji builder on tiny packages: what it draws, says, holds out and refuses."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.training.data.conftest import WORDS, iconify, tarball
from training.data import emoji, packages as npm
from training.data.folder import OutputExistsError
from training.data.packages import DrawingPackage, IconSet, PackageError, rasterise

Packages = tuple[Path, tuple[DrawingPackage, ...]]


def build(out: Path, given: Packages, **options: Any) -> Any:
    folder, drawings = given
    return emoji.build(out, packages=folder, words=WORDS, drawings=drawings, **{"size": 16, **options})


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
    assert said == json.loads((tmp_path / "out/dataset.json").read_text()) | {} or said["counts"]
    assert sum(said["counts"].values()) == len(records)
    assert {source["style"] for source in said["sources"]} == {"plain", "round", "nameless", "solid 3d"}


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
    assert (tmp_path / "out/mine.txt").is_file()
    build(tmp_path / "out", packages, overwrite=True)
    assert not (tmp_path / "out/mine.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_build_that_dies_leaves_nothing(
    tmp_path: Path, packages: Packages, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_missing_npm_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npm.shutil, "which", lambda name: None)
    with pytest.raises(PackageError, match=r"install Node\.js, or pass --packages"):
        npm.fetch(WORDS, tmp_path)


def test_npm_is_asked_once_and_its_failure_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "npm"
    fake.write_text(
        '#!/bin/sh\ncase "$*" in *words@*) echo x > "$5/words-1.0.0.tgz";; *) echo no such package >&2; exit 1;; esac\n'
    )
    fake.chmod(0o755)
    monkeypatch.setattr(npm.shutil, "which", lambda name: str(fake))
    cache = tmp_path / "cache"
    assert npm.fetch(WORDS, cache).read_text() == "x\n"
    fake.unlink()
    assert npm.fetch(WORDS, cache).is_file()
    fake.write_text("#!/bin/sh\necho no such package >&2; exit 1\n")
    fake.chmod(0o755)
    with pytest.raises(PackageError, match="no such package"):
        npm.fetch(npm.Package("other", "1.0.0", "", "", ""), cache)


def test_tarballs_are_checked(tmp_path: Path, packages: Packages) -> None:
    folder, drawings = packages
    with pytest.raises(PackageError, match=r"nowhere/words-1\.0\.0\.tgz is missing"):
        emoji.build(tmp_path / "out", packages=tmp_path / "nowhere", words=WORDS, drawings=drawings)
    pinned = npm.Package("words", "1.0.0", "MIT", "", "", sha256="0" * 64)
    with pytest.raises(PackageError, match="pinned SHA-256"):
        npm.fetch(pinned, folder)
    shutil.copytree(folder, tmp_path / "broken")
    (tmp_path / "broken" / WORDS.tarball).write_bytes(b"not a tarball")
    with pytest.raises(PackageError, match="not a readable npm tarball"):
        build(tmp_path / "out", (tmp_path / "broken", drawings))
    tarball(tmp_path / "broken" / WORDS.tarball, {"en/data.json": b"[]"})
    with pytest.raises(PackageError, match=r"has no meta/groups\.json"):
        build(tmp_path / "out", (tmp_path / "broken", drawings))
    assert not (tmp_path / "out").exists()


def test_aliases_may_flip_and_turn(tmp_path: Path) -> None:
    icons = {"left": {"body": '<path fill="#ff0000" d="M0 0h8v8h-8z"/>'}}
    aliases = {
        "right": {"parent": "left", "hFlip": True},
        "below": {"parent": "left", "vFlip": True},
        "turned": {"parent": "left", "rotate": 1},
    }
    tarball(tmp_path / "a.tgz", iconify(icons, {"2b05": "left", "27a1": "right"}, aliases))
    icon_set = IconSet.read(tmp_path / "a.tgz")

    def opaque(name: str) -> tuple[int, int]:
        drawing = icon_set.drawing(name)
        assert drawing is not None
        alpha = np.asarray(rasterise(drawing, 4))[..., 3]
        rows, columns = np.nonzero(alpha)
        return int(rows.min()), int(columns.min())

    assert opaque("left") == (0, 0)
    assert opaque("right") == (0, 2)
    assert opaque("below") == (2, 0)
    assert opaque("turned") == (0, 2)
    assert icon_set.drawing("absent") is None
    assert "right" in icon_set.names()


def test_pins_are_complete() -> None:
    pinned = (emoji.WORDS, *emoji.DRAWINGS)
    assert all(len(package.sha256) == 64 and package.licence and package.author for package in pinned)
    assert len({source.style for source in emoji.DRAWINGS}) == len(emoji.DRAWINGS) >= 5
    assert emoji.DRAWINGS[0].tarball == "iconify-json-noto-1.2.9.tgz"
