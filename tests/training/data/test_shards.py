"""Shards read like the folder they were packed from, and survive what is broken."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.data.captioned import CaptionedImages
from training.data.convert import check, write_shards
from training.data.entries import DataError
from training.data.folder import OutputExistsError


def png(value: int = 0) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (4, 4), (value, value, value)).save(data, "PNG")
    return data.getvalue()


def shard(path: Path, files: Mapping[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A set of two splits with seven good images and three faults."""
    root = tmp_path / "source"
    for split, count in (("train", 5), ("heldout", 2)):
        (root / split).mkdir(parents=True)
        lines = []
        for i in range(count):
            (root / split / f"{i}.v1.png").write_bytes(png(i))
            lines.append({"file_name": f"{i}.v1.png", "texts": [f"number {i}", "é"], "group": "g"})
        lines.append({"file_name": "absent.png", "text": "x"})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (root / split / "metadata.jsonl").write_text(text)
    (root / "train/broken.png").write_bytes(png()[:40])
    (root / "train/broken.txt").write_text("broken")
    (root / "dataset.json").write_text("{}")
    return root


def test_packed_and_read_back(tmp_path: Path, source: Path) -> None:
    reports = {report.split: report for report in write_shards(source, tmp_path / "out", per_shard=2)}
    assert (reports["train"].images, reports["heldout"].images) == (5, 2)
    assert [skipped.file for skipped in reports["train"].skipped] == [
        "absent.png (metadata.jsonl:6)",
        "broken.png",
    ]
    names = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.tar"))
    assert names == ["heldout/000000.tar", "train/000000.tar", "train/000001.tar", "train/000002.tar"]
    assert (tmp_path / "out/dataset.json").is_file()
    for split in ("train", "heldout"):
        folder = CaptionedImages.open(source, split, size=4)
        packed = CaptionedImages.open(tmp_path / "out", split, size=4)
        assert packed.records == folder.records
        assert packed.skipped == ()
        assert all(np.array_equal(packed.image(i), folder.image(i)) for i in range(len(folder)))


def test_same_set_same_bytes_and_shards_pack_again(tmp_path: Path, source: Path) -> None:
    write_shards(source, tmp_path / "a", per_shard=3)
    write_shards(tmp_path / "a", tmp_path / "b", per_shard=3)
    first, second = ([p.read_bytes() for p in sorted((tmp_path / x).rglob("*.tar"))] for x in "ab")
    assert first == second
    with pytest.raises(OutputExistsError):
        write_shards(source, tmp_path / "a")


def test_the_webdataset_library_reads_them(tmp_path: Path, source: Path) -> None:
    tariterators = pytest.importorskip("webdataset.tariterators")
    write_shards(source, tmp_path / "out", per_shard=3)
    samples = []
    for path in sorted((tmp_path / "out/train").glob("*.tar")):
        with path.open("rb") as file:
            files = tariterators.tar_file_expander([{"url": path.name, "stream": file}])
            samples += [sample for sample in tariterators.group_by_keys(files) if "json" in sample]
    assert [json.loads(sample["json"])["file_name"] for sample in samples] == [f"{i}.v1.png" for i in range(5)]
    assert samples[3]["txt"].decode() == "number 3"
    assert samples[3]["png"] == png(3)


def test_shards_of_others_in_any_layout(tmp_path: Path) -> None:
    shard(
        tmp_path / "b.tar",
        {
            "dir/x.PNG": png(1),
            "dir/x.txt": b"only text",
            "y.jpg": png(2),
            "y.json": b'{"text": "json"}',
        },
    )
    shard(tmp_path / "a.tar", {"z.webp": png(3), "z.txt": b"caption", "z.json": b'{"group": "g"}'})
    images = CaptionedImages.open(tmp_path, size=4)
    assert [record.texts for record in images.records] == [("caption",), ("only text",), ("json",)]
    assert images.records[0].fields == {"group": "g"}
    assert images.records[1].file_name == "b.tar:dir/x.png"
    assert [int(images.image(i)[0, 0, 0]) for i in range(3)] == [3, 1, 2]


def test_hidden_files_that_systems_put_in_are_passed_over(tmp_path: Path) -> None:
    members = {"._a.png": b"", "a.png": png(1), "a.txt": b"one", ".DS_Store": b"", "d/._b.png": b"", "d/b.png": png(2)}
    shard(tmp_path / "0.tar", members | {"d/b.txt": b"two"})
    images = CaptionedImages.open(tmp_path, size=4)
    assert [record.texts for record in images.records] == [("one",), ("two",)]
    assert images.skipped == ()


def test_a_class_is_read_and_stands_in_for_captions(tmp_path: Path) -> None:
    shard(
        tmp_path / "a.tar",
        {
            "a.png": png(),
            "a.cls": b"10\n",
            "b.png": png(),
            "b.cls": b"2",
            "b.txt": b"captioned",
            "c.png": png(),
            "c.json": b'{"class_name": "dog"}',
            "d.png": png(),
            "d.cls": b"cat",
        },
    )
    images = CaptionedImages.open(tmp_path, size=4)
    assert [(record.class_name, *record.texts) for record in images.records] == [
        ("10", "10"), ("2", "captioned"), ("dog", "dog"),
    ]  # fmt: skip
    assert [str(skipped) for skipped in images.skipped] == ["a.tar:d: its .cls is not a whole number"]


def test_what_is_null_in_a_samples_metadata_hides_nothing(tmp_path: Path) -> None:
    shard(
        tmp_path / "a.tar",
        {
            "a.png": png(),
            "a.cls": b"3",
            "a.json": b'{"text": "x", "class_name": null}',
            "b.png": png(),
            "b.txt": b"beside",
            "b.json": b'{"text": null, "class_name": null, "group": "g"}',
            "c.png": png(),
            "c.json": b'{"class_name": null}',
            "d.png": png(),
            "d.json": b'{"class_name": ["a"]}',
        },
    )
    images = CaptionedImages.open(tmp_path, size=4)
    assert [(record.class_name, *record.texts) for record in images.records] == [("3", "x"), ("g", "beside")]
    assert [str(skipped) for skipped in images.skipped] == [
        'a.tar:c: no caption: neither "text" nor "texts"',
        "a.tar:d: its class_name is neither a string nor a number",
    ]


def test_broken_samples_and_shards_are_named(tmp_path: Path) -> None:
    shard(
        tmp_path / "a.tar",
        {
            "good.png": png(),
            "good.txt": b"good",
            "blind.txt": b"no image",
            "mute.png": png(),
            "blank.png": png(),
            "blank.txt": b" ",
            "latin.png": png(),
            "latin.json": b'{"text": "caf\xe9"}',
            "torn.png": png(),
            "torn.json": b'{"text": ',
            "list.png": png(),
            "list.json": b"[]",
            "pixels.png": png()[:40],
            "pixels.txt": b"x",
            "one.png": png(),
            "one.json": b'{"text": "1", "file_name": "same.png"}',
            "two.png": png(),
            "two.json": b'{"text": "2", "file_name": "same.png"}',
        },
    )
    shard(tmp_path / "cut.tar", {"first.png": png(), "first.txt": b"first", "big.png": bytes(5000)})
    (tmp_path / "cut.tar").write_bytes((tmp_path / "cut.tar").read_bytes()[:4000])
    shard(tmp_path / "head.tar", {"last.png": png(), "last.txt": b"last", "big.png": bytes(5000)})
    (tmp_path / "head.tar").write_bytes((tmp_path / "head.tar").read_bytes()[:2500])
    (tmp_path / "junk.tar").write_bytes(b"junk" * 1000)
    images = CaptionedImages.open(tmp_path)
    assert [record.texts for record in images.records] == [("good",), ("1",), ("first",), ("last",)]
    said = {skipped.file: skipped.reason for skipped in images.skipped}
    expected = {
        "a.tar:blind": "no image",
        "a.tar:mute": "no caption",
        "a.tar:blank": "empty caption",
        "a.tar:latin": "not UTF-8",
        "a.tar:torn": "not JSON",
        "a.tar:list": "not a JSON object",
        "a.tar:pixels.png": "not an image",
        "a.tar:two": "duplicate file_name same.png",
        "cut.tar:big": "no caption",
        "cut.tar": "cannot be read to its end",
        "head.tar": "cannot be read to its end",
        "junk.tar": "cannot be read to its end",
    }
    assert set(said) == set(expected)
    for file, reason in expected.items():
        assert reason in said[file], file


def test_a_split_without_anything_usable_is_not_packed(tmp_path: Path) -> None:
    (tmp_path / "source/train").mkdir(parents=True)
    (tmp_path / "source/train/a.png").write_bytes(png())
    with pytest.raises(DataError, match="no usable captioned image; 1 skipped"):
        write_shards(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_check_counts(source: Path) -> None:
    heldout, train = check(source)
    assert (heldout.split, train.split) == ("heldout", "train")
    assert (train.images, train.captions, len(train.skipped)) == (5, 10, 2)
    assert train.smallest == train.largest == (4, 4)
    assert train.groups == {"g": 5}


def test_images_without_a_usual_suffix_are_packed_so_that_they_read_back(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "picture").write_bytes(png(9))
    (source / "metadata.jsonl").write_text('{"file_name": "picture", "text": "x"}')
    assert write_shards(source, tmp_path / "out")[0].images == 1
    packed = CaptionedImages.open(tmp_path / "out", size=4)
    assert packed.skipped == ()
    assert (packed.image(0) == 9).all()


def test_a_member_that_comes_twice_is_named(tmp_path: Path) -> None:
    path = tmp_path / "set" / "000.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as archive:
        for name, content in (
            ("a.png", png(1)),
            ("a.txt", b"one"),
            ("a.txt", b"two"),
            ("b.png", png()),
            ("b.txt", b"b"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    images = CaptionedImages.open(path.parent, size=4)
    assert [record.texts for record in images.records] == [("b",)]
    assert [str(skipped) for skipped in images.skipped] == ["000.tar:a: a member comes twice"]


def test_only_a_set_is_overwritten(tmp_path: Path, source: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "dear.jpg").write_bytes(b"x")
    with pytest.raises(OutputExistsError, match="is not an image set"):
        write_shards(source, tmp_path / "photos", overwrite=True)
    assert (tmp_path / "photos" / "dear.jpg").exists()


def test_what_lies_beside_shards_of_tensors_is_not_overwritten(tmp_path: Path, source: Path) -> None:
    shard(tmp_path / "data" / "latents" / "000000.tar", {"a.x.npy": b"x"})
    (tmp_path / "data" / "photos").mkdir()
    (tmp_path / "data" / "photos" / "dear.jpg").write_bytes(b"x")
    with pytest.raises(OutputExistsError, match="is not an image set"):
        write_shards(source, tmp_path / "data", overwrite=True)
    assert (tmp_path / "data" / "photos" / "dear.jpg").exists()
    (tmp_path / "data" / "photos" / "dear.jpg").unlink()
    (tmp_path / "data" / "photos").rmdir()
    (tmp_path / "data" / "latents" / "index.json").write_text('{"kind": "tensors"}')
    with pytest.raises(OutputExistsError, match="is not an image set"):
        write_shards(source, tmp_path / "data", overwrite=True)


def test_a_link_is_written_through(tmp_path: Path, source: Path) -> None:
    (tmp_path / "large").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "large")
    for _ in range(2):
        write_shards(source, tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert len(CaptionedImages.open(tmp_path / "large")) == 5
    assert {path.name for path in tmp_path.iterdir()} == {"source", "large", "link"}


def test_a_link_to_a_shard_that_is_gone_is_named(tmp_path: Path) -> None:
    shard(tmp_path / "train" / "000000.tar", {"a.png": png(1), "a.txt": b"one"})
    (tmp_path / "train" / "000001.tar").symlink_to(tmp_path / "gone")
    (skipped,) = CaptionedImages.open(tmp_path).skipped
    assert str(skipped).startswith("000001.tar: the shard cannot be read to its end")


def test_only_what_is_hidden_may_lie_beside_shards_that_are_overwritten(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    out.touch()
    with pytest.raises(OutputExistsError, match="is not an image set"):
        write_shards(source, out, overwrite=True)
    out.unlink()
    (out / "empty").mkdir(parents=True)
    with pytest.raises(OutputExistsError, match="is not an image set"):
        write_shards(source, out, overwrite=True)
    (out / "empty").rmdir()
    write_shards(source, out)
    (out / "dataset.json").unlink(missing_ok=True)
    (out / ".git").mkdir()
    with pytest.raises(OutputExistsError, match="is not an image set"):
        write_shards(source, out, overwrite=True)
    (out / ".git").rmdir()
    for hidden in (out / ".DS_Store", out / "train" / "._000000.tar"):
        hidden.touch()
    (out / "train" / "index.json").write_bytes(b"\xff")
    write_shards(source, out, overwrite=True)
    assert not (out / ".DS_Store").exists()
