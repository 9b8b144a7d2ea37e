"""Whatever a client sends, the answer is an image or a refusal in the one shape, never a fault of ours."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.service.helpers import Running, b64, box_mask, png, random_image

pytestmark = pytest.mark.anyio

GOOD: dict[str, Any] = {
    "prompt": "a cat",
    "steps": 1,
    "guidance_scale": 2.0,
    "seed": 1,
    "n": 1,
    "image": b64(png(random_image())),
    "mask": b64(png(box_mask())),
    "strength": 1.0,
}
OURS = ["class", "negative_prompt", "width", "model", "output_format", "quality", "metadata", "async", "\ud800", "x"]
OF_IMAGES = ["mask_mode", "mask_blur", "grow_mask", "reuse"]
THEIRS = ["size", "background", "response_format", "output_compression", "stream", "partial_images", "user", "image[]"]
NAMES = [*GOOD, *OURS, *OF_IMAGES, *THEIRS]
PATHS = ["generate", "edit", "inpaint", "v1/images/generations", "v1/images/edits"]

# Fields of a good request that a path knows, so that it is what is wrong that is refused.
TAKEN = {
    "generate": GOOD.keys() - {"image", "mask", "strength"},
    "edit": GOOD.keys() - {"mask"},
    "inpaint": GOOD.keys(),
    "v1/images/generations": GOOD.keys() - {"image", "mask", "strength"},
    "v1/images/edits": GOOD.keys() - {"mask"},
}

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary().map(b64)
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5)
fuzzed = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check(answer: httpx.Response) -> None:
    assert answer.status_code in (200, 202) or 400 <= answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert answer.json()["error"]["message"]


@fuzzed
@given(st.sampled_from(PATHS), st.dictionaries(st.sampled_from(NAMES), values, max_size=3))
async def test_any_value_in_any_field(app: Running, path: str, wrong: dict[str, Any]) -> None:
    taken = {name: value for name, value in GOOD.items() if name in TAKEN[path]}
    body = json.dumps(taken | wrong).encode()
    check(await app.client.post(f"/{path}", content=body, headers={"Content-Type": "application/json"}))


@fuzzed
@given(st.integers(0, 1000), st.binary(min_size=1, max_size=8), st.sampled_from(["application/json", "form"]))
async def test_damaged_bodies(app: Running, place: int, damage: bytes, kind: str) -> None:
    good = app.client.build_request("POST", "/edit", json={"prompt": "a cat", "image": GOOD["image"]})
    if kind == "form":
        files = {"image": ("a.png", png(random_image()), "image/png")}
        good = app.client.build_request("POST", "/edit", data={"prompt": "a cat"}, files=files)
    body = bytearray(good.read())
    body[place : place + len(damage)] = damage
    headers = {"Content-Type": good.headers["Content-Type"]}
    check(await app.client.post("/edit", content=bytes(body), headers=headers))
