"""Plans on disk: found under their whole key, and never given out when they do not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.plans import PlanCache, PlanError, PlanKey, Profile, plans_folder

KEY = PlanKey("a" * 64, "tensorrt 10.9", "sm89", "fp16", Profile((1, 4)))
OTHERS: dict[str, Any] = {
    "graph": "b" * 64,
    "library": "tensorrt 11.0",
    "target": "sm86",
    "precision": "fp32",
    "profile": Profile((1, 4), dynamic=True),
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


@pytest.mark.parametrize("record", ["", "[]", "{", '"key"', "{}"])
def test_a_broken_record_is_refused(cache: PlanCache, record: str) -> None:
    path = cache.save(KEY, b"plan")
    path.with_suffix(".json").write_text(record)
    with pytest.raises(PlanError):
        cache.load(KEY)


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
