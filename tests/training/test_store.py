"""Results that are kept: made once, whole on the disk, and made again where the disk lost them."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training import store
from training.store import Store, whole_file


def test_a_result_is_made_once(tmp_path: Path) -> None:
    kept, made = Store(tmp_path), iter(range(2))
    for _ in range(2):
        assert kept.array("images", {"a": 1}, lambda: np.full(3, next(made))).tolist() == [0, 0, 0]
        assert kept.figures("cells", {"a": 1}, lambda: {"fid": next(made)}) == {"fid": 1}


@pytest.mark.parametrize("left", [0, 5, 200], ids=["empty", "a part of the header", "a part of the values"])
def test_a_torn_result_is_made_again_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], left: int) -> None:
    def results() -> tuple[Any, Any]:
        array = Store(tmp_path).array("images", {"a": 1}, lambda: np.arange(64))
        figures = Store(tmp_path).figures("cells", {"a": 1}, lambda: {str(n): n for n in range(64)})
        return array.tolist(), figures

    whole = results()
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) == 2
    for file in files:
        file.write_bytes(file.read_bytes()[:left])
    assert results() == whole
    told = capsys.readouterr().out
    assert all(f"{file} cannot be read and is made again" in told for file in files)
    assert results() == whole
    assert capsys.readouterr().out == "", "made again once"


def test_a_whole_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced = tmp_path / "folder" / "file", []

    def to_disk(part: Path) -> None:
        synced.append((part.read_text(), path.exists()))

    monkeypatch.setattr(store, "to_disk", to_disk)
    with whole_file(path) as partial:
        partial.write_text("whole")
    assert synced == [("whole", False)]
    assert path.read_text() == "whole"


def test_two_who_write_the_same_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with whole_file(path) as first:
        first.write_text("first")
        with whole_file(path) as second:
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "[Errno 28] No space left on device: '{path}'"),
        (OSError("64 requested and 0 written"), "{path} was not written: 64 requested and 0 written"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "x"), "[Errno 2] No such file or directory: 'x'"),
    ],
    ids=["full", "full, as numpy says it", "another file"],
)
def test_what_could_not_be_written_is_named(tmp_path: Path, error: OSError, says: str) -> None:
    path = tmp_path / "file"
    with pytest.raises(type(error)) as raised, whole_file(path):
        raise error
    assert str(raised.value) == says.format(path=path)


def test_what_could_not_be_written_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")

    def write_in_part() -> None:
        with whole_file(path) as partial:
            partial.write_text("a part")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        write_in_part()
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "before"
