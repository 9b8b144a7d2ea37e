"""/inpaint with a mask that grows and is blurred."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engines.masks import blurred, grown
from engines.pipeline import Inpaint
from tests.service.helpers import SIZE, Running, b64, pixels, png, random_image

pytestmark = pytest.mark.anyio

IMAGE = random_image(1)
MASK = np.zeros((SIZE, SIZE), dtype=bool)
MASK[2:5, 2:5] = True
FIELDS: dict[str, Any] = {
    "prompt": "a star",
    "seed": 3,
    "image": b64(png(IMAGE)),
    "mask": b64(png(MASK.astype(np.uint8) * 255)),
}


@pytest.mark.parametrize("pixels_grown", [3, 0, -1])
async def test_the_mask_grows_and_shrinks(app: Running, pixels_grown: int) -> None:
    result = pixels(await app.post("/inpaint", **FIELDS, grow_mask=pixels_grown))
    repaint = grown(MASK, pixels_grown)
    assert np.array_equal(result, app.pipeline.run([Inpaint("a star", 4, 2.0, 3, IMAGE, repaint)])[0])
    assert np.array_equal(result[~repaint], IMAGE[~repaint])


async def test_a_blurred_mask_mixes_at_its_edge_and_keeps_what_is_far_exactly(app: Running) -> None:
    result = pixels(await app.post("/inpaint", **FIELDS, mask_blur=1.0, grow_mask=1))
    blend = blurred(grown(MASK, 1), 1.0)
    expected = app.pipeline.run([Inpaint("a star", 4, 2.0, 3, IMAGE, blend > 0, blend=blend)])[0]
    assert np.array_equal(result, expected)
    assert np.array_equal(result[6 + 6 + 1 :], IMAGE[6 + 6 + 1 :])
    hard = pixels(await app.post("/inpaint", **FIELDS, grow_mask=1))
    assert not np.array_equal(result, hard)


async def test_growth_and_blur_are_in_pixels_of_the_image_that_came(app: Running) -> None:
    large = {
        **FIELDS,
        "image": b64(png(random_image(2, size=4 * SIZE))),
        "mask": b64(png(np.kron(MASK, np.ones((4, 4))).astype(np.uint8) * 255)),
    }
    plain = pixels(await app.post("/inpaint", **large))
    wide = pixels(await app.post("/inpaint", **large, grow_mask=4))
    changed = np.argwhere((plain != wide).any(axis=2))
    # 4 pixels of an image four times as large are one pixel of the result.
    assert changed.min() == 1
    assert changed.max() == 5
    blurry = pixels(await app.post("/inpaint", **large, mask_blur=4))
    assert np.array_equal(blurry[5 + 5 :], plain[5 + 5 :])


async def test_the_bounds_are_told(app: Running) -> None:
    limits = (await app.client.get("/capabilities")).json()["limits"]
    assert (limits["max_mask_blur"], limits["max_grow_mask"]) == (256, 256)
    for fields in ({"mask_blur": 256, "grow_mask": 256}, {"grow_mask": 256}):
        assert (await app.post("/inpaint", **{**FIELDS, **fields})).status_code == 200
