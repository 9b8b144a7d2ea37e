"""Plans on disk: found under their whole key, and never given out when they do not fit."""

from __future__ import annotations

import errno
import json
import os
import stat
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.plans import PlanCache, PlanError, PlanKey, Profile, batch_sizes_up_to, plans_folder

KEY = PlanKey("a" * 64, "c" * 64, "tensorrt 10.9", "sm89", "fp16", Profile((1, 4)))
OTHERS: dict[str, Any] = {
    "graph": "b" * 64,
    "asked": "d" * 64,
    "library": "tensorrt 11.0",
    "target": "sm86",
    "precision": "fp32",
    "profile": Profile((1, 4), dynamic=True),
    "rewriting": 1,
}


@pytest.fixture
def cache(tmp_path: Path) -> PlanCache:
    return PlanCache(tmp_path / "plans")


def test_a_plan_comes_back_as_it_was(cache: PlanCache) -> None:
    assert cache.load(KEY) is None
    cache.save(KEY, b"plan")
    cache.save(KEY, b"newer")
    assert cache.load(KEY) == b"newer"
    assert [path.name for path in cache.folder.iterdir()] == [f"{KEY.digest}.plan"]


@pytest.mark.parametrize("field", list(OTHERS))
def test_a_plan_of_another_key_is_not_found(cache: PlanCache, field: str) -> None:
    cache.save(KEY, b"plan")
    assert cache.load(replace(KEY, **{field: OTHERS[field]})) is None


@pytest.mark.parametrize("field", list(OTHERS))
def test_a_plan_under_the_name_of_another_is_refused(cache: PlanCache, field: str) -> None:
    other = replace(KEY, **{field: OTHERS[field]})
    cache.save(KEY, b"plan").rename(cache.path(other))
    with pytest.raises(PlanError, match="another graph, use, library, chip"):
        cache.load(other)


def test_a_damaged_plan_is_refused(cache: PlanCache) -> None:
    path = cache.save(KEY, b"plan")
    path.write_bytes(path.read_bytes()[:-1] + b"m")
    with pytest.raises(PlanError, match="SHA-256"):
        cache.load(KEY)


@pytest.mark.parametrize("record", ["", "[]", "{", '"key"', "{}", "[" * 100_000, "\0\x80" * 100_000])
def test_a_broken_record_is_refused(cache: PlanCache, record: str) -> None:
    cache.save(KEY, b"plan").write_bytes(record.encode() + b"\nplan")
    with pytest.raises(PlanError):
        cache.load(KEY)
    assert cache.find(KEY) is None


def test_a_plan_is_for_whom_the_umask_lets_read_it(cache: PlanCache) -> None:
    before = os.umask(0o022)
    try:
        path = cache.save(KEY, b"plan")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("plan", [b"", b"\n", b"two\nlines\n", bytes(range(256)) * 1000])
def test_a_plan_may_be_any_bytes(cache: PlanCache, plan: bytes) -> None:
    cache.save(KEY, plan)
    assert cache.load(KEY) == plan


def test_a_plan_as_it_was_kept_beside_its_record_is_replaced(cache: PlanCache) -> None:
    cache.folder.mkdir()
    cache.path(KEY).write_bytes(b"plan")
    cache.path(KEY).with_suffix(".json").write_text(json.dumps({"key": KEY.document}))
    assert cache.find(KEY) is None
    cache.save(KEY, b"newer")
    assert cache.find(KEY) == (b"newer", KEY.profile)


def test_whoever_saves_a_plan_of_the_same_key_meanwhile_leaves_a_whole_one(
    cache: PlanCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process saves, and reads, before every move of a file to its place."""
    move = Path.replace

    def after_another(partial: Path, path: Path) -> Path:
        with monkeypatch.context() as alone:
            alone.setattr(Path, "replace", move)
            cache.save(KEY, b"another")
        assert cache.load(KEY) == b"another"
        return move(partial, path)

    monkeypatch.setattr(Path, "replace", after_another)
    cache.save(KEY, b"plan")
    assert cache.load(KEY) == b"plan"


def test_what_was_left_by_those_who_were_killed_is_removed_after_a_day(cache: PlanCache) -> None:
    names = [".0123456789abcdef", ".fedcba9876543210", ".of-somebody-else", ".0123456789abcdef.txt"]
    cache.folder.mkdir()
    for name in names:
        (cache.folder / name).touch()
    two_days_ago = time.time() - 2 * 24 * 3600
    for name in names[:1] + names[2:]:
        os.utime(cache.folder / name, (two_days_ago, two_days_ago))
    path = cache.save(KEY, b"plan")
    assert {file.name for file in cache.folder.iterdir()} == {*names[1:], path.name}


def test_a_full_disk_is_an_error_that_names_the_folder_and_leaves_nothing(
    cache: PlanCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(partial: Path, path: Path) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(PlanError, match=f"plans cannot be kept in {cache.folder}: No space left on device"):
        cache.save(KEY, b"plan")
    assert not list(cache.folder.iterdir())


def test_a_record_says_what_its_plan_is_of(cache: PlanCache) -> None:
    record = json.loads(cache.save(KEY, b"plan").read_bytes().split(b"\n")[0])
    assert record["key"]["library"] == "tensorrt 10.9"
    assert record["key"]["profile"] == {"batch_sizes": [1, 4], "dynamic": False}
    assert record["size_bytes"] == 4


@given(st.lists(st.integers(1, 64), min_size=1), st.booleans(), st.data())
def test_a_batch_goes_into_the_smallest_shape_that_it_fits(
    sizes: list[int], dynamic: bool, data: st.DataObject
) -> None:
    profile = Profile(tuple(sizes), dynamic)
    batch = data.draw(st.integers(1, max(sizes)))
    least, _, largest = profile.ranges[profile.bucket(batch)]
    assert batch <= largest
    assert least <= batch if dynamic else largest == min(size for size in sizes if size >= batch)
    with pytest.raises(ValueError, match="larger than"):
        profile.bucket(max(sizes) + 1)


@pytest.mark.parametrize("sizes", [(), (0, 1), (-1,)])
def test_batch_sizes_that_make_no_sense_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="positive"):
        Profile(sizes)


def test_the_folder_of_plans_can_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FEWSTEP_PLANS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert plans_folder() == tmp_path / "fewstep" / "plans"
    monkeypatch.setenv("FEWSTEP_PLANS", str(tmp_path / "here"))
    assert plans_folder() == tmp_path / "here"


def test_without_a_home_it_says_what_to_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("FEWSTEP_PLANS", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(PlanError, match=r"no folder to keep plans in .*: name one in FEWSTEP_PLANS"):
        plans_folder()


@pytest.mark.parametrize(("largest", "sizes"), [(1, (1,)), (12, (1, 2, 4, 8, 12)), (16, (1, 2, 4, 8, 16))])
def test_a_service_runs_at_powers_of_two_and_at_its_largest(largest: int, sizes: tuple[int, ...]) -> None:
    assert batch_sizes_up_to(largest) == sizes


SIZES = st.lists(st.integers(1, 9), min_size=1).map(tuple)


@given(SIZES, SIZES, st.booleans())
def test_a_profile_covers_another_when_all_its_sizes_run(ours: Any, theirs: Any, dynamic: bool) -> None:
    assert Profile(ours, dynamic=True).covers(Profile(theirs, dynamic)) == (max(ours) >= max(theirs))
    assert Profile(ours).covers(Profile(theirs)) == set(ours).issuperset(theirs)
    assert not Profile(ours).covers(Profile(theirs, dynamic=True))


def test_a_plan_that_covers_what_is_asked_for_is_found(cache: PlanCache) -> None:
    """The very one first, then static ones, then the smallest; never one of another key, or one that is damaged."""
    assert cache.find(KEY) is None
    wider = [Profile((64,), dynamic=True), Profile((8,), dynamic=True), Profile((1, 2, 4)), KEY.profile]
    for other in (*OTHERS, "narrower"):
        narrow = {"profile": Profile((1,))} if other in ("profile", "narrower") else {other: OTHERS[other]}
        cache.save(replace(KEY, **narrow), b"unfit")
    (cache.folder / "odd.plan").write_text('{"key": {"profile": {"batch_sizes": ["a"], "dynamic": 1}}}')
    assert cache.find(KEY) is None
    for profile in wider:
        cache.save(replace(KEY, profile=profile), str(profile).encode())
        assert cache.find(KEY) == (str(profile).encode(), profile)
    for profile, next_best in zip(wider[::-1], [*wider[-2::-1], None], strict=True):
        cache.path(replace(KEY, profile=profile)).write_bytes(b"damaged")
        assert cache.find(KEY) == (next_best and (str(next_best).encode(), next_best))


def test_a_plan_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "plans").write_text("a file where the folder should be")
    PlanCache(tmp_path / "plans").keep(KEY, b"plan")
    assert "cannot be kept, and is built again at every start" in caplog.text
