"""Captions of an icon, made from its style, label and tags."""

from __future__ import annotations

import random
from collections.abc import Sequence

FULL_VARIANTS = 3
MAX_TAGS = 3  # keeps nearly all captions within 24 tokens


def with_article(phrase: str) -> str:
    """The phrase with "a" or "an" before it."""
    return f"{'an' if phrase[:1].lower() in 'aeiou' else 'a'} {phrase}"


def full_caption(style: str, label: str, tags: Sequence[str]) -> str:
    """The template that names everything: "a noto icon of an apple, fruit, red"."""
    return ", ".join([f"{with_article(style)} icon of {with_article(label)}", *tags])


def icon_captions(style: str, label: str, tags: Sequence[str], rng: random.Random) -> tuple[str, ...]:
    """Distinct captions of one icon; the first is always the full one with the first tags.

    The others drop tags at random, drop the style, or mix the label and a tag, as people write prompts.
    """
    useful = [tag for tag in tags if tag.lower() != label.lower()]
    captions = [full_caption(style, label, useful[:MAX_TAGS])]
    for _ in range(FULL_VARIANTS - 1):
        count = rng.randint(0, min(MAX_TAGS, len(useful)))
        captions.append(full_caption(style, label, rng.sample(useful, count)))
    captions += [f"{label}, {style} style", label]
    if useful:
        mix = [label, *rng.sample(useful, min(len(useful), rng.randint(1, 2)))]
        rng.shuffle(mix)
        captions.append(", ".join(mix))
    return tuple(dict.fromkeys(captions))
