"""Laws of the held-out split."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from PIL import Image

from training.data.holdout import Item, choose_heldout, same_drawings, thumbnail

FAMILIES = ("a", "b", "c", "d")


def a_set(concepts: int = 40, seed: int = 0) -> tuple[list[Item], np.ndarray]:
    items = [Item(f"c{i}", family) for i in range(concepts) for family in (*FAMILIES, "a")]
    thumbnails = np.random.default_rng(seed).integers(0, 256, (len(items), 64), np.uint8)
    return items, thumbnails


def test_families_go_whole_and_concepts_keep_two_others() -> None:
    items, thumbnails = a_set()
    held = choose_heldout(items, thumbnails, 0.1, seed=0)
    pairs = {(items[i].concept, items[i].family) for i in held}
    kept = {(item.concept, item.family) for i, item in enumerate(items) if i not in held}
    assert 20 <= len(held) <= 21
    assert not pairs & kept
    left = defaultdict(set)
    for concept, family in kept:
        left[concept].add(family)
    assert min(len(families) for families in left.values()) >= 2


def test_look_alikes_stay_together() -> None:
    items, thumbnails = a_set()
    twins = {5 * i: 5 * i + 1 for i in range(40)}  # families a and b of each concept
    for i, j in twins.items():
        thumbnails[j] = thumbnails[i]
    held = choose_heldout(items, thumbnails, 0.3, seed=1)
    assert any(i in held for i in twins)
    assert all((i in held) == (j in held) for i, j in twins.items())


def test_crowds_of_look_alikes_stay_in_training() -> None:
    items, thumbnails = a_set()
    crowd = range(2, 100, 5)  # family c of twenty concepts, like clock faces
    thumbnails[list(crowd)] = 9
    assert not choose_heldout(items, thumbnails, 0.5, seed=0) & set(crowd)


def test_concepts_in_few_families_stay_in_training() -> None:
    items = [Item(f"c{i}", family) for i in range(30) for family in ("a", "b")]
    thumbnails = np.random.default_rng(0).integers(0, 256, (60, 64), np.uint8)
    assert choose_heldout(items, thumbnails, 0.5, seed=0) == frozenset()


def test_choice_follows_the_seed_and_not_the_order() -> None:
    items, thumbnails = a_set()
    order = np.random.default_rng(3).permutation(len(items))

    def pairs(seed: int, places: np.ndarray) -> set[tuple[str, str]]:
        shuffled = [items[i] for i in places]
        held = choose_heldout(shuffled, thumbnails[places], 0.1, seed)
        return {(shuffled[i].concept, shuffled[i].family) for i in held}

    same = np.arange(len(items))
    assert pairs(0, same) == pairs(0, order)
    assert pairs(0, same) != pairs(1, same)


def test_blocks_find_the_same_pairs() -> None:
    items, thumbnails = a_set(10)
    thumbnails[30] = thumbnails[3]
    concepts = [item.concept for item in items]
    assert same_drawings(concepts, thumbnails) == same_drawings(concepts, thumbnails, block=7) == [(3, 30)]


def test_thumbnails_ignore_colours_under_transparency() -> None:
    clear_red, clear_blue = (Image.new("RGBA", (64, 64), (*rgb, 0)) for rgb in ((255, 0, 0), (0, 0, 255)))
    assert np.array_equal(thumbnail(clear_red), thumbnail(clear_blue))
