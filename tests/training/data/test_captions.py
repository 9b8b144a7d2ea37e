"""Laws of icon captions."""

from __future__ import annotations

import random

from training.data.captions import full_caption, icon_captions, with_article

TAGS = ("fruit", "red", "apple", "healthy", "food")


def test_articles() -> None:
    assert with_article("owl") == "an owl"
    assert with_article("dog") == "a dog"
    assert full_caption("emojione", "apple", ()) == "an emojione icon of an apple"


def test_captions_are_distinct_seeded_and_start_with_the_full_one() -> None:
    captions = icon_captions("noto", "apple", TAGS, random.Random("x"))
    assert captions == icon_captions("noto", "apple", TAGS, random.Random("x"))
    assert len(set(captions)) == len(captions) >= 4
    assert captions[0] == "a noto icon of an apple, fruit, red, healthy"
    assert "apple" in captions
    assert "apple, noto style" in captions
    assert any("apple" in caption and "noto" not in caption and caption != "apple" for caption in captions)


def test_without_tags_there_are_still_captions() -> None:
    assert icon_captions("noto", "apple", ("Apple",), random.Random(0)) == (
        "a noto icon of an apple",
        "apple, noto style",
        "apple",
    )
