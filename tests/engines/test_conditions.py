"""The cache of encoded prompts is bounded and forgets what was not used for the longest time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.conditions import Condition, ConditionCache
from engines.pipeline import Edit, Generate, Pipeline
from tests.bundles import make_tiny_bundle


def condition(size: int, value: int = 0) -> Condition:
    return {"context": np.full(size, value, np.uint8)}


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 60)), max_size=40))
def test_it_never_holds_more_than_its_bound(puts: list[tuple[str, int]]) -> None:
    cache = ConditionCache(100)
    for prompt, size in puts:
        cache.put(prompt, condition(size))
        held = [found for name in "abcdef" if (found := cache.get(name)) is not None]
        assert prompt in cache
        assert sum(array.nbytes for one in held for array in one.values()) <= 100


def test_the_least_recently_used_goes_first() -> None:
    cache = ConditionCache(100)
    for prompt in "ab":
        cache.put(prompt, condition(50))
    cache.get("a")
    cache.put("c", condition(50))
    assert ("a" in cache, "b" in cache, "c" in cache) == (True, False, True)


def test_what_is_larger_than_the_bound_is_not_kept() -> None:
    cache = ConditionCache(100)
    cache.put("a", condition(50))
    cache.put("b", condition(101))
    assert ("a" in cache, "b" in cache) == (True, False)


def test_nobody_can_write_to_what_is_kept() -> None:
    cache = ConditionCache(100)
    cache.put("a", condition(50))
    kept = cache.get("a")
    assert kept is not None
    with pytest.raises(ValueError, match="read-only"):
        kept["context"][0] = 1


@pytest.fixture(scope="module")
def bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bundle(tmp_path_factory.mktemp("bundle"), size=16).path


def test_a_prompt_is_encoded_once_and_gives_the_same_image(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Pipeline.open(bundle_path, backend="fake") as pipeline:
        text = pipeline.manifest.text
        assert text is not None
        engine: Any = pipeline._engines[text.graph]
        encoded: list[int] = []
        run = engine.run

        def counted(inputs: Any) -> Any:
            encoded.append(len(inputs["input_ids"]))
            return run(inputs)

        monkeypatch.setattr(engine, "run", counted)
        one = Generate("a cat", 1, 1.0, 7)
        assert not pipeline.at_hand(one)
        first = pipeline.run([one])[0]
        assert pipeline.at_hand(one)
        again, other = pipeline.run([one, Generate("a dog", 1, 1.0, 7)])
        assert encoded == [1, 1]
        assert np.array_equal(first, again)
        assert not np.array_equal(first, other)


def test_an_image_to_edit_is_never_at_hand_where_it_must_be_encoded(tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path, space="latent", size=16)
    with Pipeline.open(bundle.path, backend="fake") as pipeline:
        edit = Edit("a cat", 1, 1.0, 7, np.zeros((16, 16, 3), np.uint8), 1.0)
        pipeline.run([edit])
        assert not pipeline.at_hand(edit)
