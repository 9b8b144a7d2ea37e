"""Captioned folders: every layout that works, everything broken that must be named and survived."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from training.data import captioned
from training.data.captioned import CaptionedImages, splits_of
from training.data.entries import DataError
from training.data.pixels import composite, decode, fit_square

RED = (200, 10, 10)


def picture(path: Path, size: tuple[int, int] = (8, 8), mode: str = "RGB", colour: Any = RED) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def metadata(folder: Path, *lines: Any) -> None:
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (folder / "metadata.jsonl").write_bytes(b"\n".join(raw) + b"\n")


def reasons(images: CaptionedImages) -> dict[str, str]:
    return {skipped.file: skipped.reason for skipped in images.skipped}


def test_metadata_lines_in_their_order(tmp_path: Path) -> None:
    for name in ("b.png", "a.png", "sub/c.png"):
        picture(tmp_path / "train" / name)
    metadata(
        tmp_path / "train",
        {"file_name": "b.png", "text": "a  red\nsquare"},
        {"file_name": "sub/c.png", "texts": ["one", "two", "one"], "group": "g"},
        {"file_name": "a.png", "text": "main", "texts": ["other"]},
    )
    images = CaptionedImages.open(tmp_path, size=4)
    assert [record.file_name for record in images.records] == ["b.png", "sub/c.png", "a.png"]
    assert [images.texts(i) for i in range(3)] == [("a red square",), ("one", "two"), ("main", "other")]
    assert images.records[1].fields == {"group": "g"}
    assert images.skipped == ()
    image = images.image(0)
    assert image.shape == (4, 4, 3)
    assert image.dtype == np.uint8
    assert (image == RED).all()
    assert np.array_equal(images.pixels()[0], image)


def test_caption_files_beside_the_images(tmp_path: Path) -> None:
    picture(tmp_path / "x.jpg")
    picture(tmp_path / "y.png")
    picture(tmp_path / "z.png")
    picture(tmp_path / "w.png")
    (tmp_path / "x.txt").write_text("first\n\n  second \n")
    (tmp_path / "y.txt").write_text(" \n")
    (tmp_path / "w.txt").write_bytes(b"caf\xe9")
    images = CaptionedImages.open(tmp_path)
    assert images.texts(0) == ("first", "second")
    assert reasons(images) == {
        "w.txt": "caption is not UTF-8: unexpected end of data at byte 3",
        "y.txt": "empty caption",
        "z.png": "no caption: not in metadata.jsonl, and no z.txt beside it",
    }


def test_class_folders_become_classes(tmp_path: Path) -> None:
    for name in ("b_dog/1.png", "b_dog/2.png", "a_cat/1.png"):
        picture(tmp_path / name)
    images = CaptionedImages.open(tmp_path)
    assert images.classes == ("a_cat", "b_dog")
    assert images.labels.tolist() == [0, 1, 1]
    assert images.texts(1) == ("b dog",)
    assert images.labels_in(("b_dog", "none", "a_cat")).tolist() == [2, 0, 0]
    with pytest.raises(DataError, match="unknown classes: b_dog"):
        images.labels_in(("a_cat",))


def test_groups_are_classes_and_filters(tmp_path: Path) -> None:
    for name in "abc":
        picture(tmp_path / f"{name}.png")
    metadata(
        tmp_path,
        {"file_name": "a.png", "text": "a", "group": "food", "style": "flat"},
        {"file_name": "b.png", "text": "b", "group": "food", "style": "round"},
        {"file_name": "c.png", "text": "c"},
    )
    food = CaptionedImages.open(tmp_path, groups=("food",))
    assert len(food) == 2
    assert food.classes == ("food",)
    with pytest.raises(DataError, match="has no group fod; it has food"):
        CaptionedImages.open(tmp_path, groups=("fod",))
    with pytest.raises(DataError, match=r"c\.png has neither"):
        _ = CaptionedImages.open(tmp_path).labels


def test_everything_broken_is_named_and_skipped(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    picture(folder / "good.png")
    picture(tmp_path / "outside.png")
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(whole, "PNG")
    (folder / "truncated.png").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    corrupt = bytearray(whole.getvalue())
    corrupt[60] ^= 0xFF
    (folder / "corrupt.png").write_bytes(bytes(corrupt))
    (folder / "empty.png").write_bytes(b"")
    (folder / "words.png").write_text("hello")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    picture(folder / "silent.png")
    picture(folder / "number.png")
    picture(folder / "dumb.png")
    metadata(
        folder,
        {"file_name": "good.png", "text": "good"},
        {"file_name": "truncated.png", "text": "x"},
        {"file_name": "corrupt.png", "text": "x"},
        {"file_name": "empty.png", "text": "x"},
        {"file_name": "words.png", "text": "x"},
        {"file_name": "missing.png", "text": "x"},
        {"file_name": "silent.png", "text": "  "},
        {"file_name": "number.png", "text": 3},
        {"file_name": "dumb.png"},
        {"file_name": "good.png", "text": "again"},
        {"file_name": "../outside.png", "text": "x"},
        {"file_name": "/etc/passwd", "text": "x"},
        {"file_name": "link.png", "text": "x"},
        b'{"file_name": "caf\xe9.png", "text": "x"}',
        b'{"file_name": "good.png", ',
        ["a list"],
        {"text": "nameless"},
    )
    images = CaptionedImages.open(folder)
    assert [record.file_name for record in images.records] == ["good.png", "link.png"], (
        "a link is the work of the set's owner"
    )
    said = reasons(images)
    line = "metadata.jsonl:{}".format
    expected = {
        "truncated.png": "broken image",
        "corrupt.png": "broken image",
        "empty.png": "the file is empty",
        "words.png": "not an image in a known format",
        f"missing.png ({line(6)})": "the file is missing",
        f"silent.png ({line(7)})": "no caption",
        f"number.png ({line(8)})": "a caption is not a string",
        f"dumb.png ({line(9)})": "no caption",
        f"good.png ({line(10)})": "duplicate file_name",
        f"../outside.png ({line(11)})": "inside the folder",
        f"/etc/passwd ({line(12)})": "inside the folder",
        line(14): "not UTF-8",
        line(15): "not JSON",
        line(16): 'no "file_name"',
        line(17): 'no "file_name"',
    }
    assert set(said) == set(expected)
    for file, reason in expected.items():
        assert reason in said[file], file


def test_images_beside_metadata_that_it_does_not_name_get_no_made_up_caption(tmp_path: Path) -> None:
    for name in ("images/1.png", "images/2.png", "images/3.png", ".hidden/4.png"):
        picture(tmp_path / name)
    metadata(tmp_path, {"file_name": "./images//1.png", "text": "one"}, b"{broken")
    images = CaptionedImages.open(tmp_path)
    assert [(record.file_name, record.texts) for record in images.records] == [("images/1.png", ("one",))]
    assert set(reasons(images)) == {"metadata.jsonl:2", "images/2.png", "images/3.png"}


def test_text_that_is_none_and_names_too_long_are_skipped_and_can_be_shown(tmp_path: Path) -> None:
    picture(tmp_path / "good.png")
    picture(tmp_path / "half.png")
    (tmp_path / "drawing.svg").write_text("<svg/>")
    lone = chr(0xD83D)
    metadata(
        tmp_path,
        {"file_name": "good.png", "text": "good"},
        {"file_name": "half.png", "text": f"{lone} apple"},
        {"file_name": f"{lone}.png", "text": "x"},
        {"file_name": "x" * 300 + ".png", "text": "x"},
    )
    images = CaptionedImages.open(tmp_path)
    assert [record.file_name for record in images.records] == ["good.png"]
    said = "\n".join(str(skipped) for skipped in images.skipped)
    said.encode()
    assert "half.png (metadata.jsonl:2): a caption has half a surrogate pair" in said
    assert "\\ud83d.png (metadata.jsonl:3): file_name has half a surrogate pair" in said
    assert "File name too long" in said
    assert "drawing.svg: " in said


def test_names_that_are_not_utf8_are_skipped_and_can_be_shown(tmp_path: Path) -> None:
    picture(tmp_path / "dog" / "1.png")
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        odd.mkdir()
    except OSError:
        pytest.skip("this disk takes no such names")
    picture(odd / "2.png")
    images = CaptionedImages.open(tmp_path)
    assert [record.file_name for record in images.records] == ["dog/1.png"]
    said = "\n".join(str(skipped) for skipped in images.skipped)
    said.encode()
    assert "2.png" in said
    assert "its name is not UTF-8" in said


def test_a_class_that_is_no_text_is_skipped(tmp_path: Path) -> None:
    for name in ("1.png", "2.png"):
        picture(tmp_path / name)
    odd = {"file_name": "1.png", "text": "one", "class_name": chr(0xD83D)}
    metadata(tmp_path, odd, {"file_name": "2.png", "text": "two"})
    [skipped] = CaptionedImages.open(tmp_path).skipped
    assert "its class_name has half a surrogate pair" in str(skipped)


def test_fields_that_are_null_say_nothing_and_a_class_that_is_no_name_is_skipped(tmp_path: Path) -> None:
    fields: dict[str, dict[str, Any]] = {
        "1.png": {"class_name": "ant", "style": None},
        "2.png": {"class_name": None, "group": "bee"},
        "3.png": {"class_name": 3},
        "4.png": {"class_name": ["a", "b"]},
        "5.png": {"text": "five", "group": {"name": "g"}},
    }
    for name in fields:
        picture(tmp_path / name)
    metadata(tmp_path, *({"file_name": name, "text": "x"} | more for name, more in fields.items()))
    images = CaptionedImages.open(tmp_path)
    assert images.classes == ("3", "ant", "bee")
    assert images.records[0].fields == {"class_name": "ant"}
    assert reasons(images) == {
        "4.png (metadata.jsonl:4)": "its class_name is neither a string nor a number",
        "5.png (metadata.jsonl:5)": "its group is neither a string nor a number",
    }
    metadata(tmp_path, {"file_name": "1.png", "text": "x", "class_name": None})
    with pytest.raises(DataError, match=r'1\.png has neither "class_name" nor "group"'):
        _ = CaptionedImages.open(tmp_path).classes


def test_grey_levels_of_unknown_range_are_skipped_and_damaged_exif_is_passed_over() -> None:
    for mode in ("F", "I"):
        file = io.BytesIO()
        Image.new(mode, (4, 4), 1).save(file, "TIFF")
        with pytest.raises(ValueError, match=f"mode {mode}"):
            decode(file.getvalue())
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG", exif=b"II*\0\x08")
    assert decode(file.getvalue()).size == (4, 4)


def test_xmp_turns_no_picture() -> None:
    """As in the service: browsers go by EXIF alone."""
    turned = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    for kind in ("JPEG", "WEBP"):
        file = io.BytesIO()
        Image.new("RGB", (8, 4)).save(file, kind, xmp=turned)
        assert decode(file.getvalue()).size == (8, 4)


def test_a_hub_cache_whose_files_are_links_is_read(tmp_path: Path) -> None:
    picture(tmp_path / "blobs" / "aaa.png")
    (tmp_path / "blobs" / "bbb").write_text('{"file_name": "1.png", "text": "a dog"}\n')
    split = tmp_path / "snapshots" / "main" / "train"
    split.mkdir(parents=True)
    (split / "1.png").symlink_to(tmp_path / "blobs" / "aaa.png")
    (split / "metadata.jsonl").symlink_to(tmp_path / "blobs" / "bbb")
    (split / "2.png").symlink_to(tmp_path / "blobs" / "gone")
    os.mkfifo(split / "3.png")
    images = CaptionedImages.open(split.parent)
    assert [record.texts for record in images.records] == [("a dog",)]
    assert reasons(images) == {"2.png": "a link to nothing", "3.png": "not a file"}


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.parquet"])
def test_captions_beside_the_splits_are_not_passed_over(tmp_path: Path, name: str) -> None:
    for split in ("train", "test"):
        picture(tmp_path / split / "dog" / "1.png")
    (tmp_path / name).write_text("file_name,text\ntrain/dog/1.png,a brown dog\n")
    with pytest.raises(DataError, match=rf"{name} is not read: put what it says into .*metadata\.jsonl"):
        CaptionedImages.open(tmp_path)


def test_metadata_that_are_a_link_to_nothing_are_not_passed_over(tmp_path: Path) -> None:
    picture(tmp_path / "a" / "1.png")
    (tmp_path / "metadata.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match="is not read"):
        CaptionedImages.open(tmp_path)


def test_blank_captions_give_way_to_others(tmp_path: Path) -> None:
    picture(tmp_path / "1.png")
    metadata(tmp_path, {"file_name": "1.png", "text": "one", "texts": ""})
    assert CaptionedImages.open(tmp_path).texts(0) == ("one",)


def test_captions_are_found_in_capitals_and_names_of_classes_are_tidy(tmp_path: Path) -> None:
    for name in ("dog/1.png", "my__dog/2.png", "_/3.png"):
        picture(tmp_path / name)
    (tmp_path / "dog" / "1.TXT").write_text("a brown dog")
    images = CaptionedImages.open(tmp_path)
    assert {record.file_name: record.texts for record in images.records} == {
        "_/3.png": ("_",),
        "dog/1.png": ("a brown dog",),
        "my__dog/2.png": ("my dog",),
    }


def test_metadata_and_shards_in_one_folder_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "1.png")
    metadata(tmp_path, {"file_name": "1.png", "text": "one"})
    (tmp_path / "original.tar").touch()
    with pytest.raises(DataError, match=r"both metadata\.jsonl and shards, such as original\.tar"):
        CaptionedImages.open(tmp_path)


def test_folders_that_are_called_tar_and_hidden_ones_are_no_shards_and_no_splits(tmp_path: Path) -> None:
    picture(tmp_path / "dog.tar" / "1.png")
    picture(tmp_path / ".old" / "2.png")
    metadata(tmp_path / ".old", {"file_name": "2.png", "text": "old"})
    (tmp_path / "._000000.tar").touch()
    assert list(splits_of(tmp_path)) == ["train"]
    assert [record.file_name for record in CaptionedImages.open(tmp_path).records] == ["dog.tar/1.png"]


def test_a_group_may_be_missing_in_one_split(tmp_path: Path) -> None:
    for split, groups in (("train", "ab"), ("heldout", "a")):
        for group in groups:
            picture(tmp_path / split / f"{group}.png")
        metadata(tmp_path / split, *({"file_name": f"{g}.png", "text": g, "group": g} for g in groups))
    assert len(CaptionedImages.open(tmp_path, "heldout", groups=["a", "b"])) == 1
    for wanted in (["b"], ["a", "c"]):
        with pytest.raises(DataError, match=f"has no group {wanted[-1]}; it has a"):
            CaptionedImages.open(tmp_path, "heldout", groups=wanted)


@pytest.mark.parametrize("blank", ["", "  ", None])
def test_blank_fields_say_nothing(tmp_path: Path, blank: str | None) -> None:
    """As columns of tables have them."""
    picture(tmp_path / "1.png")
    metadata(tmp_path, {"file_name": "1.png", "text": "a", "class_name": "dog", "group": blank})
    (record,) = CaptionedImages.open(tmp_path).records
    assert (record.class_name, dict(record.fields)) == ("dog", {"class_name": "dog"})


def test_the_name_of_a_class_is_no_truth_value(tmp_path: Path) -> None:
    for image in ("1.png", "2.png"):
        picture(tmp_path / image)
    metadata(tmp_path, {"file_name": "1.png", "text": "a", "class_name": True}, {"file_name": "2.png", "text": "b"})
    assert list(reasons(CaptionedImages.open(tmp_path)).values()) == ["its class_name is neither a string nor a number"]


def test_metadata_beside_splits_that_have_their_own_captions_hide_nothing(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "a" / "1.png")
    (tmp_path / "train" / "a" / "1.txt").write_text("one")
    picture(tmp_path / "test" / "2.png")
    metadata(tmp_path / "test", {"file_name": "2.png", "text": "two"})
    picture(tmp_path / "train" / "a" / "._1.png")
    (tmp_path / "metadata.csv").touch()
    (tmp_path / "metadata.parquet").mkdir()
    assert [CaptionedImages.open(tmp_path, split).texts(0) for split in ("train", "test")] == [("one",), ("two",)]


def test_a_good_line_after_a_bad_one_counts_and_so_does_one_after_a_line_that_is_too_deep(tmp_path: Path) -> None:
    picture(tmp_path / "1.png")
    metadata(tmp_path, b"[" * 200_000, {"file_name": "1.png", "text": ""}, {"file_name": "1.png", "text": "one"})
    images = CaptionedImages.open(tmp_path)
    assert [record.texts for record in images.records] == [("one",)]
    assert list(reasons(images)) == ["metadata.jsonl:1", "1.png (metadata.jsonl:2)"]


def test_what_is_skipped_is_told_in_one_line(tmp_path: Path) -> None:
    picture(tmp_path / "a\nb\r\x1b.png")
    assert str(next(iter(captioned.read_entries(tmp_path)))).startswith("a\\nb\\r\\x1b.png: no caption")


@pytest.mark.parametrize("level", [0, 300, 65535])
def test_sixteen_bits_of_a_tiff_whose_nought_is_white(level: int) -> None:
    file = io.BytesIO()
    Image.fromarray(np.full((2, 2), level, np.uint16)).save(file, "TIFF", tiffinfo={262: 0})
    assert np.asarray(decode(file.getvalue()))[0, 0].tolist() == [(65535 - level) >> 8] * 3 + [255]


def test_the_transparent_colour_is_of_the_depth_of_the_file() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def png(depth: int, colour: int, clear: bytes, row: bytes) -> bytes:
        head = struct.pack(">IIBBBBB", 1, 1, depth, colour, 0, 0, 0)
        parts = (b"IHDR", head), (b"tRNS", clear), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")
        return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)

    for depth in (1, 2, 4):
        top = (1 << depth) - 1
        data = png(depth, 0, struct.pack(">H", top), bytes([top << (8 - depth)]))
        assert np.asarray(decode(data))[0, 0].tolist() == [255, 255, 255, 0]
    colour = struct.pack(">HHH", 0xFF00, 0x8000, 0x0001)
    assert np.asarray(decode(png(16, 2, colour, colour)))[0, 0, 3] == 0


def test_links_to_folders_are_followed(tmp_path: Path) -> None:
    """Each of them, and none for ever."""
    picture(tmp_path / "set/cat/1.png")
    picture(tmp_path / "elsewhere/1.png")
    for name in ("dog", "hound"):
        (tmp_path / "set" / name).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/cat/up").symlink_to(tmp_path / "set")
    images = CaptionedImages.open(tmp_path / "set")
    assert [images.texts(i) for i in range(len(images))] == [("cat",), ("dog",), ("hound",)]
    assert not images.skipped


def test_the_transparent_level_of_sixteen_bits_is_kept() -> None:
    file = io.BytesIO()
    Image.fromarray(np.array([[0, 256, 65535]], np.uint16)).save(file, "PNG", transparency=256)
    assert np.asarray(decode(file.getvalue()))[0].tolist() == [[0, 0, 0, 255], [1, 1, 1, 0], [255, 255, 255, 255]]


def test_nothing_left_is_an_error_with_an_example(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"no usable captioned image: 1 skipped, the first is a\.png: the file is"):
        CaptionedImages.open(tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        CaptionedImages.open(tmp_path / "absent")


def test_splits(tmp_path: Path) -> None:
    picture(tmp_path / "train/dog/1.png")
    picture(tmp_path / "heldout/dog/1.png", colour=(0, 0, 9))
    assert list(splits_of(tmp_path)) == ["heldout", "train"]
    assert CaptionedImages.open(tmp_path, split="heldout").image(0)[0, 0].tolist() == [0, 0, 9]
    with pytest.raises(DataError, match='no split "test"; it has heldout, train'):
        CaptionedImages.open(tmp_path, split="test")


def test_splits_however_they_are_spelled(tmp_path: Path) -> None:
    for place in ("Training/dog/1.png", "TEST/dog/2.png", "eval/dog/3.png"):
        picture(tmp_path / place)
    assert {name: folder.name for name, folder in splits_of(tmp_path).items()} == {
        "eval": "eval", "test": "TEST", "train": "Training",
    }  # fmt: skip
    assert [record.file_name for record in CaptionedImages.open(tmp_path, split="train").records] == ["dog/1.png"]
    picture(tmp_path / "testing/dog/4.png")
    with pytest.raises(DataError, match="two folders for the split 'test'"):
        splits_of(tmp_path)


@pytest.mark.parametrize("place", ["metadata.csv", "images/metadata.jsonl", "images/metadata.parquet"])
def test_captions_that_are_not_read_are_not_replaced_by_names_of_folders(tmp_path: Path, place: str) -> None:
    picture(tmp_path / "train/images/1.png")
    (tmp_path / "train/.hidden").mkdir()
    (tmp_path / "train/.hidden/metadata.csv").touch()
    assert len(CaptionedImages.open(tmp_path).records) == 1
    (tmp_path / "train" / place).write_text("file_name,text\nimages/1.png,a red square\n")
    with pytest.raises(DataError, match=r"metadata\.\w+ is not read: put what it says into .*metadata\.jsonl"):
        CaptionedImages.open(tmp_path)


def test_a_class_may_be_called_as_a_split_is(tmp_path: Path) -> None:
    for name in ("bus", "car", "train"):
        picture(tmp_path / name / "1.png")
    assert splits_of(tmp_path) == {"train": tmp_path}
    assert CaptionedImages.open(tmp_path).classes == ("bus", "car", "train")


@pytest.mark.parametrize("inside", ["train/dog/1.png", "train/1.png"])
def test_a_split_beside_a_folder_of_other_images_stays_one(tmp_path: Path, inside: str) -> None:
    """Its classes, or the captions of its images, tell it from a class."""
    picture(tmp_path / inside)
    picture(tmp_path / "drafts/1.png")
    (tmp_path / "train/1.txt").write_text("a dog")
    assert splits_of(tmp_path) == {"train": tmp_path / "train"}


def test_padding_and_transparency_show_the_background(tmp_path: Path) -> None:
    picture(tmp_path / "a/wide.png", (16, 8))
    picture(tmp_path / "a/x_clear.png", (8, 8), "RGBA", (0, 0, 0, 0))
    picture(tmp_path / "a/y_half.png", (8, 8), "RGBA", (255, 255, 255, 128))
    images = CaptionedImages.open(tmp_path, size=8, background=(0, 100, 0))
    wide = images.image(0)
    assert (wide[2:6] == RED).all()
    assert (wide[[0, 1, 6, 7]] == (0, 100, 0)).all()
    assert (images.image(1) == (0, 100, 0)).all()
    assert images.image(2)[0, 0].tolist() == [128, 178, 128]


def test_a_photo_is_cropped_to_the_square_in_its_middle(tmp_path: Path) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (8, 20, 3), np.uint8)
    (tmp_path / "a").mkdir()
    Image.fromarray(photo).save(tmp_path / "a/wide.png")
    Image.fromarray(photo.transpose(1, 0, 2)).save(tmp_path / "a/x_tall.png")
    picture(tmp_path / "a/y_strip.png", (20_000, 1))
    images = CaptionedImages.open(tmp_path, size=8, fit="crop")
    assert np.array_equal(images.image(0), photo[:, 6:14])
    assert np.array_equal(images.image(1), photo[:, 6:14].transpose(1, 0, 2))
    assert (images.image(2) == RED).all()
    square = Image.fromarray(photo[:, :8])
    assert fit_square(square, 4, "crop") == fit_square(square, 4)


def test_a_set_too_large_for_memory_reads_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3):
        picture(tmp_path / f"a/{i}.png", colour=(i, i, i))
    (tmp_path / "a/1.png").write_bytes(b"broken")
    kept = CaptionedImages.open(tmp_path, size=8)
    monkeypatch.setattr(captioned, "CACHE_BYTES", 0)
    lazy = CaptionedImages.open(tmp_path, size=8)
    assert len(kept) == len(lazy) == 2
    assert all(np.array_equal(kept.image(i), lazy.image(i)) for i in range(2))
    assert lazy.skipped == kept.skipped


def test_reducing_by_whole_numbers_is_the_area_mean() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    small = np.asarray(fit_square(Image.fromarray(noise), 4).convert("RGB"), np.float64)
    mean = noise.reshape(4, 3, 4, 3, 3).mean((1, 3))
    assert np.abs(small - mean).max() < 1  # Pillow rounds after each of its two passes


def test_resizing_before_compositing_does_not_bleed_hidden_colour() -> None:
    hidden = np.zeros((8, 8, 4), np.uint8)
    hidden[:, ::2] = (255, 0, 0, 0)
    hidden[:, 1::2] = (0, 0, 255, 255)
    small = np.asarray(fit_square(Image.fromarray(hidden), 4))
    assert (small == (0, 0, 255, 128)).all()
    assert composite(small, (0, 0, 0))[0, 0].tolist() == [0, 0, 128]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"])
def test_every_usual_mode_decodes(mode: str) -> None:
    grey = Image.fromarray(np.full((4, 4), 255, np.uint8))
    image = Image.fromarray(np.full((4, 4), 65535, np.uint16)) if mode == "I;16" else grey.convert(mode)
    data = io.BytesIO()
    image.save(data, "TIFF")
    decoded = decode(data.getvalue())
    assert decoded.mode == "RGBA"
    assert decoded.getpixel((1, 1)) == (255, 255, 255, 255)


def test_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = io.BytesIO()
    Image.new("RGB", (8, 4)).save(data, "JPEG", exif=exif)
    assert decode(data.getvalue()).size == (4, 8)


def test_absurdly_large_images_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = io.BytesIO()
    Image.new("1", (20, 6)).save(data, "PNG")
    for limit in (100, 50):  # Pillow warns above its limit and fails above twice that
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match="too large"):
            decode(data.getvalue())
