"""npm packages: fetched once, checked against their pins, read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from training.data import emoji
from training.data import packages as npm
from training.data.packages import DrawingPackage, IconSet, Package, PackageError, rasterise

WORDS = Package("words", "1.0.0", "MIT", "", "")
Write = Callable[..., None]


def test_missing_npm_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npm.shutil, "which", lambda name: None)
    with pytest.raises(PackageError, match=r"install Node\.js, or pass --packages"):
        npm.fetch(WORDS, tmp_path)


def test_npm_is_asked_once_and_its_failure_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "npm"
    fake.write_text('#!/bin/sh\necho "$6" > "$5/words-1.0.0.tgz"\n')
    fake.chmod(0o755)
    monkeypatch.setattr(npm.shutil, "which", lambda name: str(fake))
    cache = tmp_path / "cache"
    assert npm.fetch(WORDS, cache).read_text() == "words@1.0.0\n"
    fake.unlink()
    assert npm.fetch(WORDS, cache).is_file()
    fake.write_text('#!/bin/sh\n[ "$2" = --silent ] || echo no such package >&2; exit 1\n')
    fake.chmod(0o755)
    with pytest.raises(PackageError, match=r"or pass --packages DIR with other-1\.0\.0\.tgz in it: no such package"):
        npm.fetch(npm.Package("other", "1.0.0", "", "", ""), cache)


def test_tarballs_are_checked(
    tmp_path: Path, packages: tuple[Path, Package, tuple[DrawingPackage, ...]], write_tarball: Write
) -> None:
    folder, words, drawings = packages

    def build(tarballs: Path) -> None:
        emoji.build(tmp_path / "out", packages=tarballs, words=words, drawings=drawings)

    with pytest.raises(PackageError, match=r"nowhere/words-1\.0\.0\.tgz is missing"):
        build(tmp_path / "nowhere")
    with pytest.raises(PackageError, match="pinned SHA-256"):
        npm.fetch(Package("words", "1.0.0", "MIT", "", "", sha256="0" * 64), folder)
    shutil.copytree(folder, tmp_path / "broken")
    (tmp_path / "broken" / words.tarball).write_bytes(b"not a tarball")
    with pytest.raises(PackageError, match="not a readable npm tarball"):
        build(tmp_path / "broken")
    write_tarball(tmp_path / "broken" / words.tarball, {"en/data.json": b"[]"})
    with pytest.raises(PackageError, match=r"has no meta/groups\.json"):
        build(tmp_path / "broken")
    write_tarball(tmp_path / "broken" / words.tarball, {"en/data.json": b"[", "meta/groups.json": b"{}"})
    with pytest.raises(PackageError, match="broken JSON"):
        build(tmp_path / "broken")
    assert not (tmp_path / "out").exists()


def test_aliases_may_flip_and_turn(
    tmp_path: Path, write_tarball: Write, iconify_files: Callable[..., dict[str, bytes]]
) -> None:
    icons = {"left": {"body": '<path fill="#ff0000" d="M0 0h8v8h-8z"/>'}}
    aliases = {
        "right": {"parent": "left", "hFlip": True},
        "below": {"parent": "left", "vFlip": True},
        "turned": {"parent": "left", "rotate": 1},
    }
    write_tarball(tmp_path / "a.tgz", iconify_files(icons, {"2b05": "left", "27a1": "right"}, aliases))
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
