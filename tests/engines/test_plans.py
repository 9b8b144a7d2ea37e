"""Plans on disk: found under their whole key, and never given out when they do not fit."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.plans import PlanCache, PlanError, PlanKey, Profile, batch_sizes_up_to, plans_folder

KEY = PlanKey("a" * 64, "tensorrt 10.9", "sm89", "fp16", Profile((1, 4)))
OTHERS: dict[str, Any] = {
    "graph": "b" * 64,
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
    assert sorted(path.suffix for path in cache.folder.iterdir()) == [".json", ".plan"]


@pytest.mark.parametrize("field", list(OTHERS))
def test_a_plan_of_another_key_is_not_found(cache: PlanCache, field: str) -> None:
    cache.save(KEY, b"plan")
    assert cache.load(replace(KEY, **{field: OTHERS[field]})) is None


@pytest.mark.parametrize("field", list(OTHERS))
def test_a_plan_under_the_name_of_another_is_refused(cache: PlanCache, field: str) -> None:
    other = replace(KEY, **{field: OTHERS[field]})
    saved = cache.save(KEY, b"plan")
    for path in (saved, saved.with_suffix(".json")):
        path.rename(cache.path(other).with_suffix(path.suffix))
    with pytest.raises(PlanError, match="another graph, library, chip"):
        cache.load(other)


def test_a_damaged_plan_is_refused(cache: PlanCache) -> None:
    path = cache.save(KEY, b"plan")
    path.write_bytes(b"plam")
    with pytest.raises(PlanError, match="SHA-256"):
        cache.load(KEY)


@pytest.mark.parametrize("record", ["", "[]", "{", '"key"', "{}", "[" * 100_000])
def test_a_broken_record_is_refused(cache: PlanCache, record: str) -> None:
    path = cache.save(KEY, b"plan")
    path.with_suffix(".json").write_text(record)
    with pytest.raises(PlanError):
        cache.load(KEY)
    assert cache.find(KEY) is None


def test_a_plan_is_for_whom_the_umask_lets_read_it(cache: PlanCache) -> None:
    before = os.umask(0o022)
    try:
        path = cache.save(KEY, b"plan")
    finally:
        os.umask(before)
    assert [stat.S_IMODE(file.stat().st_mode) for file in (path, path.with_suffix(".json"))] == [0o644, 0o644]


def test_a_plan_without_its_record_is_none(cache: PlanCache) -> None:
    cache.save(KEY, b"plan").with_suffix(".json").unlink()
    assert cache.load(KEY) is None


def test_a_record_says_what_its_plan_is_of(cache: PlanCache) -> None:
    record = json.loads(cache.save(KEY, b"plan").with_suffix(".json").read_text())
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
    (cache.folder / "odd.json").write_text('{"key": {"profile": {"batch_sizes": ["a"], "dynamic": 1}}}')
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
