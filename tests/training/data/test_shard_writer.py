"""The writer of tensor shards: whole shards, the same bytes, and work taken up where it stopped."""

from __future__ import annotations

import io
import tarfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from numpy.typing import NDArray
from webdataset import tariterators

from training.data.place import Place, StreamError
from training.data.shard_index import PROGRESS, MadeWith, ShardIndex, make_index
from training.data.shard_writer import TensorShardWriter


def sample(i: int, captions: int = 2) -> dict[str, NDArray[Any]]:
    x = np.full((1, 2, 2), i, np.float32)
    return {"x": x, "context": np.full((captions, 3, 4), i, np.float16), "label": np.full(captions, i)}


def write(address: str, items: int, per_shard: int = 3, source: str = "", stop: int | None = None) -> int:
    """Writes items, but those that are done already; a `stop` dies before that item. Returns how many were done."""
    with TensorShardWriter(address, per_shard, source) as writer:
        for i in range(writer.done, items):
            if i == stop:
                raise KeyboardInterrupt
            writer.write(sample(i))
        return writer.done


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def memory() -> Iterator[str]:
    """An address in memory."""
    address = f"memory://{uuid.uuid4().hex}"
    yield address
    fsspec.filesystem("memory").rm(address, recursive=True)


def test_the_files_are_shards_and_an_index_only(tmp_path: Path) -> None:
    write(str(tmp_path / "a"), 7)
    assert sorted(content(tmp_path / "a")) == ["000000.tar", "000001.tar", "000002.tar", "index.json"]
    with tarfile.open(tmp_path / "a/000002.tar") as archive:
        assert archive.getnames() == ["000000006.context.npy", "000000006.label.npy", "000000006.x.npy"]
        (member,) = (member for member in archive if member.name.endswith("label.npy"))
        file = archive.extractfile(member)
        assert file is not None
        assert np.load(io.BytesIO(file.read())).tolist() == [6, 6]


def test_the_webdataset_library_reads_the_shards(tmp_path: Path) -> None:
    write(str(tmp_path), 3)
    with (tmp_path / "000000.tar").open("rb") as file:
        files = tariterators.tar_file_expander([{"url": "000000.tar", "stream": file}])
        found = [np.load(io.BytesIO(sample["context.npy"])) for sample in tariterators.group_by_keys(files)]
    assert [context.tolist() for context in found] == [sample(i)["context"].tolist() for i in range(3)]


def test_the_index_at_the_end_is_the_one_that_reading_every_shard_gives(tmp_path: Path) -> None:
    write(str(tmp_path), 7)
    written = (tmp_path / "index.json").read_bytes()
    (tmp_path / "index.json").unlink()
    assert make_index(str(tmp_path)).counts == [3, 3, 1]
    assert (tmp_path / "index.json").read_bytes() == written


def test_what_shards_were_made_with_is_in_their_index_and_stays_when_they_are_indexed_again(tmp_path: Path) -> None:
    made_with = MadeWith(classes=("cat", "dog"))
    with TensorShardWriter(str(tmp_path), 2, "a source", made_with) as writer:
        writer.write(sample(0))
    index = ShardIndex.read(writer.place)
    assert index.made_with == made_with
    assert make_index(str(tmp_path)) == index == ShardIndex.read(writer.place)


def test_what_was_begun_with_other_classes_is_not_gone_on_with(tmp_path: Path) -> None:
    with TensorShardWriter(str(tmp_path), 2, made_with=MadeWith(classes=("cat", "dog"))) as writer:
        writer.write(sample(0))
    with pytest.raises(StreamError, match="another source"):
        TensorShardWriter(str(tmp_path), 2, made_with=MadeWith(classes=("cat", "cow")))


def test_the_same_input_gives_the_same_bytes_on_disk_and_in_memory(tmp_path: Path, memory: str) -> None:
    write(str(tmp_path / "a"), 7)
    write(memory, 7)
    files = fsspec.filesystem("memory")
    there = {Path(name).name: files.cat_file(name) for name in files.ls(memory, detail=False)}
    assert there == content(tmp_path / "a")


def test_the_layout_of_an_array_does_not_change_the_bytes(tmp_path: Path) -> None:
    for name, order in (("a", "C"), ("b", "F")):
        with TensorShardWriter(str(tmp_path / name), 2) as writer:
            writer.write({"x": np.asarray(np.arange(24, dtype=np.float32).reshape(2, 3, 4), order=order)})  # type: ignore[call-overload]
    assert content(tmp_path / "a") == content(tmp_path / "b")


@pytest.mark.parametrize("stop", range(9))
def test_stopped_anywhere_and_taken_up_it_gives_the_same_bytes(tmp_path: Path, stop: int) -> None:
    write(str(tmp_path / "straight"), 8)
    if stop < 8:
        with pytest.raises(KeyboardInterrupt):
            write(str(tmp_path / "stopped"), 8, stop=stop)
        assert not (tmp_path / "stopped/index.json").exists()
    else:
        write(str(tmp_path / "stopped"), 8)
    done = write(str(tmp_path / "stopped"), 8)
    assert done == (8 if stop == 8 else stop // 3 * 3)
    assert content(tmp_path / "stopped") == content(tmp_path / "straight")


def test_a_shard_that_was_not_moved_into_place_is_written_again(tmp_path: Path) -> None:
    write(str(tmp_path / "straight"), 8)
    with pytest.raises(KeyboardInterrupt):
        write(str(tmp_path / "stopped"), 8, stop=6)
    (tmp_path / "stopped/000001.tar").rename(tmp_path / "stopped/.000001.tar.partial")
    assert write(str(tmp_path / "stopped"), 8) == 3
    assert content(tmp_path / "stopped") == content(tmp_path / "straight")


def test_a_short_last_shard_of_a_run_without_index_is_written_again(tmp_path: Path) -> None:
    write(str(tmp_path / "a"), 4)
    (tmp_path / "a/index.json").rename(tmp_path / "a" / PROGRESS)
    assert write(str(tmp_path / "a"), 6) == 3
    write(str(tmp_path / "straight"), 6)
    assert content(tmp_path / "a") == content(tmp_path / "straight")


def test_a_complete_set_takes_no_more(tmp_path: Path) -> None:
    write(str(tmp_path), 7)
    with TensorShardWriter(str(tmp_path), 3) as writer, pytest.raises(StreamError, match="complete, with 7 samples"):
        writer.write(sample(7))


def test_what_was_begun_otherwise_is_not_gone_on_with(tmp_path: Path) -> None:
    write(str(tmp_path / "a"), 7, source="one model")
    assert write(str(tmp_path / "a"), 7, source="one model") == 7
    with pytest.raises(StreamError, match="another source"):
        write(str(tmp_path / "a"), 7, source="another model")
    with pytest.raises(StreamError, match="another number"):
        write(str(tmp_path / "a"), 7, per_shard=2, source="one model")
    (tmp_path / "a/index.json").unlink()
    with pytest.raises(StreamError, match="not begun here"):
        write(str(tmp_path / "a"), 7, source="one model")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": np.zeros((2, 2), np.float32)}, r"x is missing, or is not \(c, h, w\)"),
        ({"x": np.zeros((1, 2, 2))}, "float16 or float32"),
        ({"x": np.full((1, 2, 2), np.inf, np.float16)}, "x has values that are not finite"),
        ({"label": np.zeros(5, np.int64)}, "no first axis in common"),
        ({"label": np.array(3)}, "no first axis in common"),
        ({"label": np.array(["a", "b"])}, "label is of"),
        ({"label": np.array([1, 2], ">i8")}, "label is of >i8"),
        ({"Pooled": np.zeros((2, 3), np.float32)}, '"Pooled" is not a name'),
        ({"pooled": np.zeros((2, 3), np.float32)}, "others have context 3x4 float16, label scalar int64, x 1x2x2"),
        ({"context": np.zeros((2, 9, 4), np.float16)}, "context 9x4 float16, .*others have"),
    ],
)
def test_a_sample_that_is_none_is_refused_with_its_number(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    writer = TensorShardWriter(str(tmp_path), 2)
    writer.write(sample(0))
    with pytest.raises(StreamError, match=f"sample 1.*{said}"):
        writer.write(sample(1) | change)
    assert list(tmp_path.iterdir()) == []


def test_items_may_differ_in_the_number_of_captions(tmp_path: Path) -> None:
    with TensorShardWriter(str(tmp_path), 2) as writer:
        writer.write(sample(0, captions=1))
        writer.write(sample(1, captions=5))
    assert ShardIndex.read(writer.place).arrays["context"].shape == (3, 4)


def test_nothing_written_is_no_set(tmp_path: Path) -> None:
    with pytest.raises(StreamError, match="no sample was written"):
        write(str(tmp_path), 0)
    with pytest.raises(StreamError, match="a sample at least"):
        TensorShardWriter(str(tmp_path), 0)


def test_a_place_that_cannot_be_written_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StreamError, match=r"^[^\n]*file/sub/\S+ cannot be [^\n]*$"):
        write(str(tmp_path / "file/sub"), 1)


def test_what_was_not_precomputed_to_its_end_is_neither_indexed_nor_streamed(tmp_path: Path) -> None:
    address = str(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        write(address, 8, stop=7)
    said = "not precomputed to its end: the same `fewstep precompute` goes on"
    with pytest.raises(StreamError, match=said):
        make_index(address)
    with pytest.raises(StreamError, match=said):
        ShardIndex.read(Place(address))


def test_shards_that_somebody_indexed_meanwhile_are_gone_on_with(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(str(tmp_path / "stopped"), 8, source="a", stop=7)
    progress = tmp_path / "stopped" / PROGRESS
    kept = progress.read_bytes()
    progress.unlink()
    make_index(str(tmp_path / "stopped"))
    progress.write_bytes(kept)
    assert write(str(tmp_path / "stopped"), 8, source="a") == 6
    write(str(tmp_path / "straight"), 8, source="a")
    assert content(tmp_path / "stopped") == content(tmp_path / "straight")
