"""Streaming: the items of any shard, a few shards in memory, reads ahead, and shards that are lost."""

from __future__ import annotations

import re
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from training.data.captioned import CaptionedImages
from training.data.convert import write_shards
from training.data.order import ShardOrder
from training.data.place import Place, StreamError
from training.data.shard_contents import ImageFit
from training.data.shard_index import make_index
from training.data.shard_writer import TensorShardWriter
from training.data.stream import ShardStream

NO_PAUSES = (0.0, 0.0)


class UnsteadyFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """Files in memory, of which reads can fail, or wait, and are counted."""

    protocol = "unsteady"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    cachable = False
    reads: ClassVar[Counter[str]] = Counter()
    failures: ClassVar[dict[str, list[Exception]]] = {}
    gate: ClassVar[threading.Event] = threading.Event()
    lock: ClassVar[threading.Lock] = threading.Lock()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("unsteady://").strip("/")

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        name = path.rpartition("/")[2]
        with self.lock:
            self.reads[name] += 1
            failures = self.failures.get(name)
            failure = failures.pop(0) if failures else None
        self.gate.wait(10)
        if failure:
            raise failure
        data: bytes = super().cat_file(path, start, end, **options)
        return data


@pytest.fixture
def unsteady() -> Iterator[type[UnsteadyFileSystem]]:
    """The file system, without files, failures or counts."""
    fsspec.register_implementation("unsteady", UnsteadyFileSystem, clobber=True)
    UnsteadyFileSystem.store.clear()
    UnsteadyFileSystem.pseudo_dirs[:] = [""]
    UnsteadyFileSystem.reads.clear()
    UnsteadyFileSystem.failures.clear()
    UnsteadyFileSystem.gate.set()
    yield UnsteadyFileSystem
    UnsteadyFileSystem.gate.set()


ADDRESS = "unsteady://set"


def write(address: str, items: int, per_shard: int = 4) -> None:
    """Items whose values are their numbers, with one to three captions each: number + caption / 8."""
    with TensorShardWriter(address, per_shard) as writer:
        for i in range(items):
            captions = i + np.arange(1 + i % 3) / 8
            writer.write(
                {
                    "x": np.full((1, 2, 2), i, np.float16),
                    "context": np.broadcast_to(captions[:, None, None], (len(captions), 2, 3)).astype(np.float32),
                    "label": np.full(len(captions), i),
                }
            )


def numbers(stream: ShardStream, items: torch.Tensor) -> list[int]:
    """What the stream gives for items, once all its arrays agree on it."""
    parts = stream.parts(items)
    assert torch.equal(parts["x"], parts["label"][:, None, None, None].expand(-1, 1, 2, 2).half())
    assert torch.equal(parts["context"], parts["label"][:, None, None].expand(-1, 2, 3).float())
    return [int(number) for number in parts["label"]]


def reads(unsteady: type[UnsteadyFileSystem]) -> dict[str, int]:
    return {name: count for name, count in unsteady.reads.items() if name.endswith(".tar")}


@pytest.fixture(params=["disk", "memory"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A set of 10 items in shards of 4, 4 and 2."""
    if request.param == "disk":
        write(str(tmp_path), 10)
        yield str(tmp_path)
    else:
        name = f"memory://{uuid.uuid4().hex}"
        write(name, 10)
        yield name
        fsspec.filesystem("memory").rm(name, recursive=True)


def test_items_come_in_the_order_asked_for_from_any_shards(address: str) -> None:
    with ShardStream(address) as stream:
        assert (len(stream), stream.shape, stream.counts) == (10, (1, 2, 2), [4, 4, 2])
        assert numbers(stream, torch.tensor([9, 0, 4, 3, 9, 8])) == [9, 0, 4, 3, 9, 8]


def test_arrays_keep_their_types_and_come_without_captions_axis(address: str) -> None:
    with ShardStream(address) as stream:
        parts = stream.parts(torch.tensor([1, 2]))
    assert {name: (tuple(part.shape), part.dtype) for name, part in parts.items()} == {
        "x": ((2, 1, 2, 2), torch.float16),
        "context": ((2, 2, 3), torch.float32),
        "label": ((2,), torch.int64),
    }


def test_draws_choose_among_the_captions_of_each_item(address: str) -> None:
    with ShardStream(address) as stream:
        draws = torch.tensor([0.0, 0.34, 0.99, 0.49, 0.5, 0.99])
        context = stream.parts(torch.tensor([2, 2, 2, 1, 1, 0]), draws)["context"]
    assert context[:, 0, 0].tolist() == [2, 2.125, 2.25, 1, 1.125, 0]


def test_an_epoch_of_the_order_has_every_item_once(address: str) -> None:
    with ShardStream(address) as stream:
        order = ShardOrder(stream.counts, 5, seed=1)
        assert sorted(n for update in range(2) for n in numbers(stream, order.at(update))) == list(range(10))


def test_no_items_are_no_rows(address: str) -> None:
    with ShardStream(address) as stream:
        assert stream.parts(torch.zeros(0, dtype=torch.int64))["context"].shape == (0, 2, 3)


@pytest.mark.parametrize("item", [-1, 10])
def test_items_that_there_are_not_are_refused(address: str, item: int) -> None:
    with ShardStream(address) as stream, pytest.raises(IndexError, match="of a set of 10"):
        stream.parts(torch.tensor([0, item]))


def test_the_fingerprint_differs_with_the_content(tmp_path: Path) -> None:
    for name, items in (("a", 10), ("b", 10), ("c", 9)):
        write(str(tmp_path / name), items)
    prints = []
    for name in "abc":
        with ShardStream(str(tmp_path / name)) as stream:
            prints.append(stream.fingerprint)
    assert prints[0] == prints[1] != prints[2]


def test_images_come_as_the_folder_has_them_with_their_captions(tmp_path: Path) -> None:
    for i in range(5):
        path = tmp_path / f"source/{'ab'[i % 2]} c/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (6, 4), (40 * i, 10, 200, 90)).save(path)
    write_shards(tmp_path / "source", tmp_path / "out", per_shard=2)
    make_index(str(tmp_path / "out/train"))
    packed = CaptionedImages.open(tmp_path / "out", size=8, background=(0, 0, 9))
    items = torch.tensor([4, 0, 3])
    with ShardStream(str(tmp_path / "out/train"), fit=ImageFit(8, (0, 0, 9))) as stream:
        assert stream.shape == (3, 8, 8)
        x = stream.parts(items)["x"]
        assert x.dtype == torch.uint8
        assert np.array_equal(x.permute(0, 2, 3, 1), np.stack([packed.image(int(i)) for i in items]))
        assert stream.texts(items) == [packed.texts(int(i)) for i in items]
    with pytest.raises(StreamError, match="a size of images goes with images only"):
        ShardStream(str(tmp_path / "out/train"))


def test_tensors_take_no_size_of_images_and_have_no_captions(address: str) -> None:
    with pytest.raises(StreamError, match="a size of images goes with images only"):
        ShardStream(address, fit=ImageFit(8))
    with ShardStream(address) as stream, pytest.raises(StreamError, match="captions are not kept"):
        stream.texts(torch.tensor([0]))


def test_an_epoch_reads_every_shard_once(unsteady: type[UnsteadyFileSystem]) -> None:
    write(ADDRESS, 40)
    with ShardStream(ADDRESS) as stream:
        order = ShardOrder(stream.counts, 3, seed=0)  # so that batches lie in two windows
        for update in range(11):  # the last of them begin in the last window
            stream.parts(order.at(update))
            stream.prefetch(order.ahead(update))
        stream._pool.submit(lambda: None).result(10)  # behind what is read ahead, and would not be any more at the end
    assert reads(unsteady) == {f"{n:06d}.tar": 1 for n in range(10)}


def test_what_is_read_ahead_too_late_is_not_read_again(unsteady: type[UnsteadyFileSystem]) -> None:
    write(ADDRESS, 40)
    go = threading.Event()
    with ShardStream(ADDRESS) as stream:
        order = ShardOrder(stream.counts, 3, seed=0)
        stream._pool.submit(go.wait, 10)
        for update in range(11):
            stream.parts(order.at(update))
            stream.prefetch(order.ahead(update))
        go.set()
        stream._pool.submit(lambda: None).result(10)
    assert reads(unsteady) == {f"{n:06d}.tar": 1 for n in range(10)}


def test_a_window_is_read_while_the_one_before_it_is_in_use(unsteady: type[UnsteadyFileSystem]) -> None:
    write(ADDRESS, 40)
    with ShardStream(ADDRESS) as stream:
        order = ShardOrder(stream.counts, 2, seed=0)
        windows = [
            {f"{int(item) // 4:06d}.tar" for item in torch.cat([order.at(u) for u in window])}
            for window in (range(4), range(4, 8), range(8, 12))
        ]
        for update in range(5):
            stream.parts(order.at(update))
            stream.prefetch(order.ahead(update))
            stream._pool.submit(lambda: None).result(10)
            assert set(reads(unsteady)) == set.union(*windows[: 2 if update < 4 else 3])


def test_no_more_shards_are_kept_than_two_windows_have(unsteady: type[UnsteadyFileSystem]) -> None:
    write(ADDRESS, 40)
    with ShardStream(ADDRESS, window=1) as stream:
        assert numbers(stream, torch.arange(40)) == list(range(40))
        assert len(stream._kept) == 2
        stream.parts(torch.tensor([39, 35]))
        assert max(reads(unsteady).values()) == 1
        stream.parts(torch.tensor([0]))
        assert reads(unsteady)["000000.tar"] == 2


def test_what_was_prefetched_is_not_read_again(unsteady: type[UnsteadyFileSystem]) -> None:
    write(ADDRESS, 12)
    unsteady.reads.clear()
    with ShardStream(ADDRESS) as stream:
        stream.prefetch(torch.tensor([5, 0, 6]))
        stream.prefetch(torch.tensor([5]))
        stream._pool.submit(lambda: None).result(10)
        assert reads(unsteady) == {"000001.tar": 1, "000000.tar": 1}
        assert numbers(stream, torch.tensor([5, 0])) == [5, 0]
        assert reads(unsteady) == {"000001.tar": 1, "000000.tar": 1}


def test_prefetching_returns_at_once_and_parts_waits_for_it(unsteady: type[UnsteadyFileSystem]) -> None:
    write(ADDRESS, 12)
    with ShardStream(ADDRESS) as stream:
        unsteady.gate.clear()
        stream.prefetch(torch.tensor([0]))
        threading.Timer(0.05, unsteady.gate.set).start()
        assert numbers(stream, torch.tensor([1])) == [1]
        assert reads(unsteady) == {"000000.tar": 1}


def test_prefetching_displaces_no_shard_in_use(unsteady: type[UnsteadyFileSystem]) -> None:
    write(ADDRESS, 40)
    with ShardStream(ADDRESS) as stream:
        stream.parts(torch.tensor([0, 4]))
        stream.prefetch(torch.arange(8, 40))
        stream._pool.submit(lambda: None).result(10)
        stream.parts(torch.tensor([0, 4]))
    assert reads(unsteady) == {f"{n:06d}.tar": 1 for n in range(4)}


def test_many_threads_get_their_own_items_and_share_the_reads(unsteady: type[UnsteadyFileSystem]) -> None:
    write(ADDRESS, 40)
    found: dict[int, list[int]] = {}
    with ShardStream(ADDRESS, window=5) as stream:

        def work(seed: int) -> None:
            items = torch.randint(40, (64,), generator=torch.Generator().manual_seed(seed))
            stream.prefetch(items)
            found[seed] = [a - b for a, b in zip(numbers(stream, items), items.tolist(), strict=True)]

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert found == {seed: [0] * 64 for seed in range(8)}
    assert reads(unsteady) == {f"{n:06d}.tar": 1 for n in range(10)}


def test_a_closed_stream_gives_nothing_and_leaves_no_thread(unsteady: type[UnsteadyFileSystem]) -> None:
    write(ADDRESS, 12)
    before = threading.active_count()
    with ShardStream(ADDRESS) as stream:
        stream.prefetch(torch.tensor([0, 5]))
    assert threading.active_count() == before
    with pytest.raises(StreamError, match="is closed"):
        stream.parts(torch.tensor([0]))
    stream.prefetch(torch.tensor([9]))
    stream.close()


def test_closing_does_not_wait_for_the_next_try(unsteady: type[UnsteadyFileSystem]) -> None:
    write(ADDRESS, 12)
    unsteady.failures["000000.tar"] = [OSError("unplugged")]
    with ShardStream(ADDRESS, pauses=(600.0,)) as stream:
        stream.prefetch(torch.tensor([0]))
        while not unsteady.reads["000000.tar"]:
            time.sleep(0.001)
    assert stream.lost == {}


def test_a_read_that_fails_twice_is_tried_again_and_told(
    unsteady: type[UnsteadyFileSystem], capsys: pytest.CaptureFixture[str]
) -> None:
    write(ADDRESS, 12)
    unsteady.failures["000001.tar"] = [OSError("unplugged"), RuntimeError("a broken\nanswer")]
    with ShardStream(ADDRESS, pauses=(0.0, 0.001)) as stream:
        assert numbers(stream, torch.tensor([5])) == [5]
        assert stream.lost == {}
    assert capsys.readouterr().out.splitlines() == [
        "unsteady://set/000001.tar: unplugged; trying again in 0 s",
        "unsteady://set/000001.tar: RuntimeError: a broken answer; trying again in 0.001 s",
    ]


def test_a_third_failure_loses_the_shard(unsteady: type[UnsteadyFileSystem]) -> None:
    write(ADDRESS, 12)
    unsteady.failures["000001.tar"] = [OSError("unplugged")] * 3
    with ShardStream(ADDRESS, pauses=NO_PAUSES) as stream:
        assert numbers(stream, torch.tensor([5])) == [9]
        assert stream.lost == {"000001.tar": "unplugged"}


def test_an_index_that_fails_once_is_tried_again(unsteady: type[UnsteadyFileSystem]) -> None:
    write(ADDRESS, 12)
    unsteady.failures["index.json"] = [OSError("unplugged")]
    with ShardStream(ADDRESS, pauses=NO_PAUSES) as stream:
        assert len(stream) == 12
    unsteady.failures["index.json"] = [OSError("unplugged")] * 3
    with pytest.raises(StreamError, match=r"index\.json cannot be read: unplugged"):
        ShardStream(ADDRESS, pauses=NO_PAUSES)


def damage(path: Path, fault: str) -> None:
    whole = path.read_bytes()
    if fault == "missing":
        path.unlink()
    else:
        path.write_bytes({"shorter": whole[:-512], "longer": whole + b"\0", "other": b"\1" + whole[1:]}[fault])


FAULTS = {
    "missing": "^the file is missing$",
    "shorter": r"it has \d+ bytes, and \d+ in the index",
    "longer": "bytes, and",
    "other": "its SHA-256 is not that of the index",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_next_shard_stands_in_for_a_lost_one(tmp_path: Path, fault: str) -> None:
    write(str(tmp_path), 10)
    damage(tmp_path / "000001.tar", fault)
    with ShardStream(str(tmp_path), pauses=NO_PAUSES) as stream:
        assert numbers(stream, torch.arange(10)) == [0, 1, 2, 3, 8, 9, 8, 9, 8, 9]
        assert list(stream.lost) == ["000001.tar"]


def test_the_first_shard_stands_in_for_the_last(tmp_path: Path) -> None:
    write(str(tmp_path), 10)
    damage(tmp_path / "000002.tar", "missing")
    with ShardStream(str(tmp_path)) as stream:
        assert numbers(stream, torch.tensor([8, 9])) == [0, 1]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_lost_shard_is_told_once_by_name_with_the_reason(
    tmp_path: Path, fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(str(tmp_path), 10)
    damage(tmp_path / "000001.tar", fault)
    with ShardStream(str(tmp_path), pauses=()) as stream:
        for _ in range(3):
            stream.parts(torch.arange(10))
        (reason,) = stream.lost.values()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path}: shard 000001.tar is lost: {reason}; ")
    assert line.endswith("its 4 items (1 lost, 1 allowed)")
    assert re.search(FAULTS[fault], reason)


def test_a_missing_shard_is_not_waited_for(unsteady: type[UnsteadyFileSystem]) -> None:
    write(ADDRESS, 12)
    Place(ADDRESS).remove("000001.tar")
    with ShardStream(ADDRESS, pauses=(600.0,)) as stream:
        assert numbers(stream, torch.tensor([4])) == [8]
    assert reads(unsteady)["000001.tar"] == 1


def test_what_stands_in_does_not_depend_on_what_was_asked_before(tmp_path: Path) -> None:
    write(str(tmp_path), 160)
    for name in ("000005.tar", "000006.tar"):
        damage(tmp_path / name, "other")
    found = []
    for first in (20, 24):
        with ShardStream(str(tmp_path), pauses=()) as stream:
            stream.prefetch(torch.tensor([first]))
            stream.parts(torch.tensor([first]))
            found.append(numbers(stream, torch.arange(16, 36)))
    assert found[0] == found[1] == [16, 17, 18, 19, *([28, 29, 30, 31] * 3), 32, 33, 34, 35]


@pytest.mark.parametrize(("shards", "allowed"), [(3, 1), (39, 1), (40, 2)])
def test_one_lost_shard_in_twenty_is_allowed_and_no_more(tmp_path: Path, shards: int, allowed: int) -> None:
    write(str(tmp_path), shards, per_shard=1)
    lost = [2 * n for n in range(allowed + 1)]
    for number in lost:
        damage(tmp_path / f"{number:06d}.tar", "missing")
    with ShardStream(str(tmp_path)) as stream:
        assert numbers(stream, torch.tensor(lost[:-1])) == [number + 1 for number in lost[:-1]]
        with pytest.raises(StreamError) as raised:
            stream.parts(torch.tensor(lost))
    said = str(raised.value)
    assert said.startswith(f"{allowed + 1} of the {shards} shards of {tmp_path} are lost, and {allowed} may be: ")
    assert all(f"{number:06d}.tar: " in said for number in lost)
    assert "\n" not in said


def test_a_set_whose_only_shard_is_lost_stops(tmp_path: Path) -> None:
    write(str(tmp_path), 3)
    damage(tmp_path / "000000.tar", "missing")
    with (
        ShardStream(str(tmp_path)) as stream,
        pytest.raises(StreamError, match=r"no shard .* can be read: 000000\.tar"),
    ):
        stream.parts(torch.tensor([0]))


def test_losses_found_while_prefetching_stop_the_next_parts(tmp_path: Path) -> None:
    write(str(tmp_path), 10)
    for name in ("000000.tar", "000001.tar"):
        damage(tmp_path / name, "missing")
    with ShardStream(str(tmp_path)) as stream:
        stream.prefetch(torch.tensor([0]))
        with pytest.raises(StreamError, match="2 of the 3 shards"):
            stream.parts(torch.tensor([0]))


def test_a_shard_unlike_what_the_index_says_it_has_is_lost(tmp_path: Path) -> None:
    write(str(tmp_path), 10)
    index = (tmp_path / "index.json").read_text()
    (tmp_path / "index.json").write_text(index.replace('"samples": 2', '"samples": 1'))
    with ShardStream(str(tmp_path)) as stream:
        assert numbers(stream, torch.tensor([8])) == [0]
        assert stream.lost == {"000002.tar": "it has 2 samples, and 1 in the index"}


def test_a_set_without_an_index_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(StreamError, match=rf"`fewstep data index {tmp_path}` makes it"):
        ShardStream(str(tmp_path))
