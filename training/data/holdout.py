"""Which drawings are held out for evaluation: whole families of look-alikes, never half of one."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

THUMBNAIL_PX = 16
# Mean squared difference (over premultiplied RGBA in 0..255) below which two drawings count as the same,
# chosen by eye on sorted pairs. One concept drawn twice is a redrawing up to a far larger difference than
# two concepts are.
SAME_DRAWING = 100
SAME_CONCEPT_DRAWING = 1200
LARGEST_GROUP = 4
MIN_FAMILIES = 3


@dataclass(frozen=True)
class Item:
    """One drawing: what it shows, and the family of styles that draw it the same way."""

    concept: str
    family: str


def thumbnail(image: Image.Image) -> NDArray[np.uint8]:
    """Premultiplied RGBA thumbnail, flattened, for comparing drawings."""
    small = image.convert("RGBa").resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX)
    return np.asarray(small, np.uint8).reshape(-1)


def choose_heldout(items: Sequence[Item], thumbnails: NDArray[np.uint8], fraction: float, seed: int) -> frozenset[int]:
    """Indices of the items to hold out, at least `fraction` of all where enough of them qualify.

    Items are grouped when they are one concept in one family, or when their drawings look the same; a
    group goes out whole. Only small groups qualify, whose concepts are each drawn in at least three
    families, and each concept gives at most one group, so that training still sees it in two other styles.
    The order is a hash of the seed and the group, so it does not depend on the number of items.

    `thumbnails` has shape (items, features).
    """
    families: dict[str, set[str]] = defaultdict(set)
    for item in items:
        families[item.concept].add(item.family)

    def qualifies(group: Sequence[int]) -> bool:
        taken: dict[str, set[str]] = defaultdict(set)
        for i in group:
            taken[items[i].concept].add(items[i].family)
        return len(group) <= LARGEST_GROUP and all(
            len(families[concept]) >= MIN_FAMILIES and len(families[concept] - gone) >= MIN_FAMILIES - 1
            for concept, gone in taken.items()
        )

    qualified = [group for group in _groups(items, thumbnails) if qualifies(group)]
    qualified.sort(key=lambda group: _order(items[group[0]], seed))
    chosen: set[int] = set()
    used: set[str] = set()
    for group in qualified:
        if len(chosen) >= fraction * len(items):
            break
        concepts = {items[i].concept for i in group}
        if not concepts & used:
            used |= concepts
            chosen.update(group)
    return frozenset(chosen)


def _order(item: Item, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{item.concept}:{item.family}".encode()).hexdigest()


def _groups(items: Sequence[Item], thumbnails: NDArray[np.uint8]) -> list[list[int]]:
    parent = list(range(len(items)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def join(i: int, j: int) -> None:
        first, second = sorted((root(i), root(j)))
        parent[second] = first

    seen: dict[Hashable, int] = {}
    for i, item in enumerate(items):
        join(i, seen.setdefault((item.concept, item.family), i))
    for i, j in same_drawings([item.concept for item in items], thumbnails):
        join(i, j)
    groups: dict[int, list[int]] = defaultdict(list)
    for i in range(len(items)):
        groups[root(i)].append(i)
    return list(groups.values())


def same_drawings(concepts: Sequence[str], thumbnails: NDArray[np.uint8], block: int = 1024) -> list[tuple[int, int]]:
    """Pairs (i < j) of drawings that look the same. `thumbnails` has shape (drawings, features)."""
    # float64 products of whole numbers are exact, so the result is the same on every machine.
    features = thumbnails.astype(np.float64)
    squares = (features**2).sum(1)
    count = features.shape[1]
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(features), block):
        rows = slice(start, start + block)
        distances = squares[rows, None] + squares[None] - 2 * features[rows] @ features.T
        for row, j in np.argwhere(distances < SAME_CONCEPT_DRAWING * count):
            i = start + int(row)
            same = concepts[i] == concepts[j] or distances[row, j] < SAME_DRAWING * count
            if i < j and same:
                pairs.append((i, int(j)))
    return pairs
