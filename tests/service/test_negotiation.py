"""Which form of answer the Accept header gets."""

from __future__ import annotations

from typing import Any

import pytest

from service.errors import ApiError
from service.negotiation import choose
from service.schemas import GenerateRequest


def form(accept: str | None, **fields: Any) -> str:
    rendering = choose(accept, GenerateRequest(**fields))
    return f"{'raw' if rendering.raw else 'json'} {rendering.format}"


@pytest.mark.parametrize(
    ("accept", "fields", "expected"),
    [
        (None, {}, "json png"),
        ("", {}, "json png"),
        ("*/*", {}, "json png"),
        ("application/json", {"output_format": "webp"}, "json webp"),
        ("image/*", {}, "raw png"),
        ("image/*", {"output_format": "jpeg"}, "raw jpeg"),
        ("image/webp", {}, "raw webp"),
        ("IMAGE/WEBP ; q=1.0", {}, "raw webp"),
        ("image/avif,image/webp,*/*;q=0.8", {}, "raw webp"),
        ("application/json;q=0.1, image/jpeg;q=0.2", {}, "raw jpeg"),
        ("image/*;q=0.5, image/png;q=0, */*;q=0.1", {}, "raw jpeg"),
        ("image/png, */*;q=0.1", {"n": 2}, "json png"),
        ("image/png, */*;q=0.1", {"response_format": "b64_json"}, "json png"),
    ],
)
def test_the_best_liked_form_wins_and_json_wins_ties(accept: str | None, fields: dict[str, Any], expected: str) -> None:
    assert form(accept, **fields) == expected


@pytest.mark.parametrize(
    ("accept", "fields"),
    [
        ("text/html", {}),
        ("image/*", {"n": 2}),
        ("image/png", {"output_format": "jpeg"}),
        ("image/*", {"response_format": "b64_json"}),
        ("application/json;q=0", {}),
        ("application/json;q=nan", {}),
        ("*/*;q=7", {}),
        (";;,,", {}),
    ],
)
def test_what_cannot_be_had_is_406(accept: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        form(accept, **fields)
    assert (caught.value.status, caught.value.code) == (406, "not_acceptable")
