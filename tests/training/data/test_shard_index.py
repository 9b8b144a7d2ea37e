"""Indexing shards: what is noted, what is refused and by which name."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from click.testing import CliRunner
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from training.data.commands import data
from training.data.place import Place, StreamError
from training.data.shard_index import ShardIndex, make_index
from training.store import hash_of


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(array))
    return file.getvalue()


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (value, value, value)).save(file, "PNG")
    return file.getvalue()


def shard(path: Path, files: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


X = npy(np.zeros((1, 2, 2), np.float16))
FIRST = {"a.x.npy": X, "a.context.npy": npy(np.ones((2, 3, 4), np.float32))}
SECOND = {name.replace("a", "b", 1): content for name, content in FIRST.items()}
PICTURE = {"a.png": png(1), "a.txt": b"one"}


def test_the_index_says_what_each_shard_has_in_the_order_of_names(tmp_path: Path) -> None:
    shard(tmp_path / "2.tar", FIRST)
    shard(tmp_path / "1.tar", SECOND | {name.replace("b", "c", 1): content for name, content in SECOND.items()})
    made = make_index(str(tmp_path))
    assert json.loads((tmp_path / "index.json").read_text()) == {
        "format_version": 1,
        "kind": "tensors",
        "arrays": {"context": {"shape": [3, 4], "dtype": "float32"}, "x": {"shape": [1, 2, 2], "dtype": "float16"}},
        "source": "",
        "shards": [
            {
                "name": name,
                "samples": samples,
                "size_bytes": (tmp_path / name).stat().st_size,
                "sha256": hashlib.sha256((tmp_path / name).read_bytes()).hexdigest(),
            }
            for name, samples in (("1.tar", 2), ("2.tar", 1))
        ],
    }
    assert ShardIndex.read(Place(str(tmp_path))) == made


def test_hidden_files_that_systems_put_in_do_not_count(tmp_path: Path) -> None:
    shard(tmp_path / "0.tar", {"._a.png": b"", **PICTURE, ".DS_Store": b""})
    assert make_index(str(tmp_path)).counts == [1]


def test_the_fingerprint_is_of_the_bytes_of_the_shards(tmp_path: Path) -> None:
    shard(tmp_path / "1.tar", FIRST)
    before = make_index(str(tmp_path)).fingerprint
    assert make_index(str(tmp_path)).fingerprint == before
    shard(tmp_path / "1.tar", SECOND)
    assert make_index(str(tmp_path)).fingerprint != before


def test_the_command_tells_what_it_indexed(tmp_path: Path) -> None:
    shard(tmp_path / "1.tar", FIRST)
    shard(tmp_path / "2.tar", SECOND)
    result = CliRunner().invoke(data, ["index", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert result.output.endswith("2 samples in 2 shards: context 3x4 float32, x 1x2x2 float16\n")


def test_shards_that_the_data_command_packed_can_be_indexed(tmp_path: Path) -> None:
    (tmp_path / "set/cat").mkdir(parents=True)
    for i in range(3):
        (tmp_path / f"set/cat/{i}.png").write_bytes(png(i))
    CliRunner().invoke(data, ["shards", str(tmp_path / "set"), str(tmp_path / "out"), "--per-shard", "2"])
    result = CliRunner().invoke(data, ["index", str(tmp_path / "out/train")])
    assert result.output.endswith("3 samples in 2 shards: captioned images\n")


def test_the_folders_of_splits_are_named_where_the_shards_lie_in_them(tmp_path: Path) -> None:
    for split in ("train", "heldout"):
        (tmp_path / split).mkdir()
        shard(tmp_path / split / "0.tar", PICTURE)
    with pytest.raises(StreamError, match=rf"no \.tar shard; index one of {tmp_path}/train, {tmp_path}/heldout$"):
        make_index(str(tmp_path))


def test_an_index_from_before_the_origin_was_noted_has_the_same_fingerprint(tmp_path: Path) -> None:
    """A run that was begun with it goes on."""
    shard(tmp_path / "1.tar", FIRST)
    made = make_index(str(tmp_path))
    assert made.fingerprint == hash_of(json.loads((tmp_path / "index.json").read_text()))
    assert "made_with" not in (tmp_path / "index.json").read_text()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "it has no sample"),
        (FIRST, "it is the same as 1.tar"),
        (FIRST | {"c.x.npy": X}, "sample a is in another shard too"),
        ({"b.x.npy": X}, "sample b has x 1x2x2 float16; others have context 3x4 float32, x 1x2x2 float16"),
        (SECOND | {"b.json": b"{}"}, r"sample b: part \.json is not an array: it is not a \.npy file"),
        (SECOND | {"b.context.npy": X[:-1]}, r"sample b: part \.context\.npy is not an array"),
        (SECOND | {"b.context.npy": b"no"}, r"sample b: part \.context\.npy is not an array"),
        (SECOND | {"b.context.npy": npy(np.full((1, 3, 4), np.nan, np.float32))}, "sample b: context has values"),
        ({"b.png": png(1), "b.txt": b"one"}, r"sample b has \.png, \.txt; others are tensors"),
    ],
)
def test_a_faulty_shard_of_tensors_is_refused_by_name(tmp_path: Path, files: dict[str, bytes], said: str) -> None:
    shard(tmp_path / "1.tar", FIRST)
    shard(tmp_path / "2.tar", files)
    with pytest.raises(StreamError, match=rf"2\.tar cannot be indexed: .*{said}"):
        make_index(str(tmp_path))
    assert not (tmp_path / "index.json").exists()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"b.txt": b"one"}, "sample b: the sample has no image"),
        ({"b.png": png(1)}, "sample b: no caption"),
        ({"b.png": png(1)[:50], "b.txt": b"one"}, "sample b: broken image"),
        (FIRST, r"sample a is in another shard"),
        (SECOND, r"sample b has \.x\.npy, \.context\.npy; others are images"),
    ],
)
def test_a_faulty_shard_of_images_is_refused_by_name(tmp_path: Path, files: dict[str, bytes], said: str) -> None:
    shard(tmp_path / "1.tar", PICTURE)
    shard(tmp_path / "2.tar", files)
    with pytest.raises(StreamError, match=rf"2\.tar cannot be indexed: {said}"):
        make_index(str(tmp_path))


def test_a_part_that_comes_twice_is_refused(tmp_path: Path) -> None:
    shard(tmp_path / "1.tar", FIRST)
    whole = (tmp_path / "1.tar").read_bytes().rstrip(b"\0")
    padded = whole + b"\0" * (-len(whole) % 512)
    (tmp_path / "1.tar").write_bytes(padded + (tmp_path / "1.tar").read_bytes())
    with pytest.raises(StreamError, match=r"1\.tar cannot be indexed: a\.x\.npy comes twice"):
        make_index(str(tmp_path))


@pytest.mark.parametrize("length", [0, 300, 700, 1024, 1500])
def test_a_shard_that_is_cut_off_is_refused_wherever_it_ends(tmp_path: Path, length: int) -> None:
    shard(tmp_path / "1.tar", FIRST)
    (tmp_path / "1.tar").write_bytes((tmp_path / "1.tar").read_bytes()[:length])
    with pytest.raises(StreamError, match=r"1\.tar cannot be indexed: it is not a whole tar"):
        make_index(str(tmp_path), pauses=())


def test_a_compressed_tar_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "1.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.x.npy"))
    with pytest.raises(StreamError, match="is not a whole tar"):
        make_index(str(tmp_path))


def test_a_place_without_shards_is_refused(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "absent"):
        with pytest.raises(StreamError, match=r"holds no \.tar shard"):
            make_index(str(place))


def test_only_an_index_is_overwritten(tmp_path: Path) -> None:
    shard(tmp_path / "1.tar", FIRST)
    (tmp_path / "index.json").write_text('{"mine": 1}')
    with pytest.raises(StreamError, match="is not an index of shards"):
        make_index(str(tmp_path))
    assert (tmp_path / "index.json").read_text() == '{"mine": 1}'


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format_version": 2}, "format_version"),
        ({"shards": []}, "shards"),
        ({"kind": "images"}, "the arrays are not those of images"),
        ({"arrays": {}}, "the arrays are not those of tensors"),
        ({"arrays": {"x": {"shape": [4], "dtype": "float16"}}}, r"x is not \(c, h, w\)"),
        ({"extra": 1}, "extra"),
    ],
)
def test_an_index_that_is_none_is_told_in_one_line(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    shard(tmp_path / "1.tar", FIRST)
    make_index(str(tmp_path))
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(index | change))
    with pytest.raises(StreamError, match=rf"^[^\n]*index\.json is not an index of shards: [^\n]*{said}[^\n]*$"):
        ShardIndex.read(Place(str(tmp_path)))


@pytest.mark.parametrize("name", ["../1.tar", "a/1.tar", ".1.tar", "1.zip"])
def test_an_index_leads_to_no_other_place(tmp_path: Path, name: str) -> None:
    shard(tmp_path / "1.tar", FIRST)
    make_index(str(tmp_path))
    text = (tmp_path / "index.json").read_text().replace('"1.tar"', json.dumps(name))
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(StreamError, match=r"shards\.0\.name"):
        ShardIndex.read(Place(str(tmp_path)))


def test_a_missing_index_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(StreamError, match=rf"`fewstep data index {tmp_path}` makes it"):
        ShardIndex.read(Place(str(tmp_path)))


@pytest.mark.parametrize("address", ["nowhere://a", "s3://a"])
def test_an_address_that_cannot_be_opened_is_told_in_one_line(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    result = CliRunner().invoke(data, ["index", address])
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: {address} cannot be opened: ")
    assert result.output.count("\n") == 1


def test_links_to_shards_are_shards(tmp_path: Path) -> None:
    """As in the cache of a hub."""
    for folder in ("blobs", "set"):
        (tmp_path / folder).mkdir()
    for k, content in enumerate((FIRST, SECOND)):
        shard(tmp_path / "blobs" / f"{k}", content)
        (tmp_path / "set" / f"{k:06d}.tar").symlink_to(tmp_path / "blobs" / f"{k}")
    (tmp_path / "set" / "000002.tar").symlink_to(tmp_path / "blobs" / "gone")
    assert make_index(str(tmp_path / "set")).counts == [1, 1]


@pytest.mark.parametrize("name", ["s[1]", "s*"])
def test_an_address_has_no_patterns(name: str) -> None:
    place = Place(f"memory://{name}")
    place.write("a.json", b"{}")
    place.write("a.json", b"[]")
    assert (place.read("a.json"), place.names(".json")) == (b"[]", ["a.json"])
    place.remove("a.json")


def test_a_file_system_that_only_renames_is_written_to(tmp_path: Path) -> None:
    """As sftp and smb, which copy nothing."""

    class Renaming(MemoryFileSystem):
        protocol = "renaming"

        def mv(self, path1: str, path2: str, **options: Any) -> None:
            if self.exists(path2):
                raise FileExistsError(path2)
            super().cp_file(path1, path2)
            self.rm_file(path1)

        def cp_file(self, path1: str, path2: str, **options: Any) -> None:
            raise NotImplementedError

    fsspec.register_implementation("renaming", Renaming, clobber=True)
    place = Place(f"renaming://{tmp_path.name}")
    for content in (b"{}", b"[]"):
        place.write("a.json", content)
        assert place.read("a.json") == content
