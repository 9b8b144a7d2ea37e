"""The three endpoints: what they give, and that it is what was asked for."""

from __future__ import annotations

import asyncio
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engines.images import fit
from engines.pipeline import Edit, Generate, Inpaint
from service.batching import finisher
from service.openai import ImagesEditBody
from service.schemas import EditRequest, InpaintRequest
from service.settings import Settings
from tests.service.helpers import (
    SIZE,
    Gate,
    Pixels,
    Running,
    b64,
    box_mask,
    error,
    pixels,
    png,
    random_image,
    read_pixels,
    running,
    until,
)

pytestmark = pytest.mark.anyio

JSON = {"Content-Type": "application/json"}
IMAGE = random_image(1)
MASK = box_mask()


async def test_an_image_that_cannot_be_written_fails_alone(
    app: Running, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = finisher.encode_image

    def fussy(image: Pixels, format: str, **options: Any) -> bytes:
        if format == "jpeg":
            raise ValueError("EXIF data is too long")
        return encode(image, format, **options)

    monkeypatch.setattr(finisher, "encode_image", fussy)
    wanted = [asyncio.create_task(app.post("/generate", prompt="a cat", output_format="jpeg"))]
    wanted += [asyncio.create_task(app.post("/generate", prompt="a cat")) for _ in range(3)]
    await until(lambda: app.service.inflight == 4)
    gate.opened.set()
    failed, *made = [await answer for answer in wanted]
    assert error(failed, 500, "generation_failed")["retryable"] is False
    assert [answer.status_code for answer in made] == [200] * 3


async def test_whole_numbers_are_integers_however_they_are_written(app: Running) -> None:
    fields = '"prompt": "a cat", "steps": 2.0, "seed": 7e0, "n": 1.0, "guidance_scale": 3.0, "quality": 9e1'
    answer = await app.client.post("/generate", content=f'{{{fields}, "output_format": "webp"}}', headers=JSON)
    assert (answer.status_code, answer.json()["images"][0]["seed"]) == (200, 7)
    assert answer.json()["batch"] == {"ticks": [1, 1]}


async def test_generate(app: Running) -> None:
    answer = await app.post("/generate", prompt="a red heart", steps=2, guidance_scale=3.5, seed=7)
    expected = app.pipeline.run([Generate("a red heart", 2, 2.5, 7)])[0]
    assert np.array_equal(pixels(answer), expected)
    body = answer.json()
    assert body.keys() == {"id", "created", "model", "revision", "images", "timings", "batch"}
    assert (body["model"], body["revision"]) == ("tiny", app.pipeline.manifest.revision)
    assert [{**image, "b64_json": ""} for image in body["images"]] == [
        {"b64_json": "", "seed": 7, "width": SIZE, "height": SIZE}
    ]
    assert body["batch"] == {"ticks": [1, 1]}
    timings = body["timings"]
    stages = sum(timings[f"{stage}_ms"] for stage in ("queue", "encode", "denoise", "decode"))
    assert 0 < stages <= timings["total_ms"] + 0.01
    assert all(value >= 0 for value in timings.values())


async def test_defaults_are_those_of_the_capabilities(app: Running) -> None:
    able = (await app.client.get("/capabilities")).json()
    explicit = {"steps": able["default_steps"], "guidance_scale": able["guidance_scale"]["default"]}
    assert explicit == {"steps": 4, "guidance_scale": 3.0}
    short = await app.post("/generate", prompt="a cat", seed=1)
    long = await app.post("/generate", prompt="a cat", seed=1, **explicit)
    assert np.array_equal(pixels(short), pixels(long))


async def test_neutral_options_are_accepted(app: Running) -> None:
    revision = app.pipeline.manifest.revision
    answer = await app.post(
        "/generate",
        prompt="a cat",
        negative_prompt="",
        width=SIZE,
        height=None,
        model=f"tiny@{revision}",
        response_format="b64_json",
    )
    assert answer.status_code == 200


async def test_image_i_uses_seed_plus_i(app: Running) -> None:
    several = await app.post("/generate", prompt="a cat", seed=40, n=3)
    assert [image["seed"] for image in several.json()["images"]] == [40, 41, 42]
    for index in range(3):
        single = await app.post("/generate", prompt="a cat", seed=40 + index)
        assert np.array_equal(pixels(several, index), pixels(single))


async def test_a_random_seed_is_told_and_makes_the_image_again(app: Running) -> None:
    first, second = [await app.post("/generate", prompt="a cat") for _ in range(2)]
    seeds = [answer.json()["images"][0]["seed"] for answer in (first, second)]
    assert seeds[0] != seeds[1]
    again = await app.post("/generate", prompt="a cat", seed=seeds[0])
    assert np.array_equal(pixels(first), pixels(again))
    assert not np.array_equal(pixels(first), pixels(second))


async def test_alone_or_in_company_the_image_is_the_same(app: Running, gate: Gate) -> None:
    app.pipeline.prepare([Generate("a dog", 1, 0.0, 0)])  # a prompt that is at hand joins the next tick
    first = asyncio.create_task(app.post("/generate", prompt="a cat", seed=5))
    await asyncio.to_thread(gate.reached.wait, 20)
    company = [
        asyncio.create_task(app.post("/generate", prompt="a dog", seed=seed, guidance_scale=1 + seed / 4))
        for seed in range(12)
    ]
    await until(lambda: app.service.inflight == 13 and app.metric("fewstep_queue_depth") == 12)
    gate.opened.set()
    together = await first
    assert together.json()["batch"]["ticks"] == [1, 13, 13, 13]
    assert {answer.status_code for answer in await asyncio.gather(*company)} == {200}
    alone = await app.post("/generate", prompt="a cat", seed=5)
    assert np.array_equal(pixels(together), pixels(alone))


async def test_edit(app: Running) -> None:
    answer = await app.post("/edit", prompt="the sun", image=b64(png(IMAGE)), strength=0.5, seed=3)
    expected = app.pipeline.run([Edit("the sun", 4, 2.0, 3, IMAGE, strength=0.5)])[0]
    assert np.array_equal(pixels(answer), expected)
    assert len(answer.json()["batch"]["ticks"]) == 2


@pytest.mark.parametrize(("steps", "ticks"), [(1, 1), (2, 1), (4, 3)])
async def test_an_edit_that_names_no_strength_gets_one_that_works(app: Running, steps: int, ticks: int) -> None:
    answer = await app.post("/edit", prompt="the sun", image=b64(png(IMAGE)), steps=steps)
    assert len(answer.json()["batch"]["ticks"]) == ticks


async def test_inpaint_gives_back_what_is_not_masked_exactly(app: Running) -> None:
    fields = {"prompt": "a star", "image": b64(png(IMAGE)), "mask": b64(png(MASK)), "seed": 3}
    result = pixels(await app.post("/inpaint", **fields))
    repaint = MASK > 0
    assert np.array_equal(result[~repaint], IMAGE[~repaint])
    assert not np.array_equal(result[repaint], IMAGE[repaint])
    expected = app.pipeline.run([Inpaint("a star", 4, 2.0, 3, IMAGE, repaint)])[0]
    assert np.array_equal(result, expected)


async def test_mask_modes_say_the_same_in_other_ways(app: Running) -> None:
    clear = np.dstack([IMAGE, np.where(MASK > 0, 0, 255).astype(np.uint8)])
    results = [
        pixels(
            await app.post("/inpaint", prompt="a star", image=b64(png(IMAGE)), seed=3, mask=b64(mask), mask_mode=mode)
        )
        for mode, mask in (("white", png(MASK)), ("black", png(255 - MASK)), ("alpha", png(clear)))
    ]
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


async def test_an_image_of_another_size_is_resized_and_the_resized_pixels_are_kept(app: Running) -> None:
    large = random_image(2, size=2 * SIZE)
    resized = fit(large, (SIZE, SIZE))
    mask = np.zeros((2 * SIZE, 2 * SIZE), dtype=np.uint8)
    mask[3, 5] = 255
    answer = await app.post("/inpaint", prompt="a star", image=b64(png(large)), mask=b64(png(mask)), seed=3)
    result = pixels(answer)
    changed = (result != resized).any(axis=2)
    assert result.shape == IMAGE.shape
    assert np.array_equal(np.argwhere(changed), [[1, 2]])


async def test_a_latent_bundle_keeps_unmasked_pixels_exactly_too(
    anyio_backend: str, settings: Settings, latent_bundle_path: Path
) -> None:
    async with running(settings.model_copy(update={"bundle": str(latent_bundle_path)})) as app:
        fields = {"prompt": "a star", "image": b64(png(IMAGE)), "mask": b64(png(MASK)), "seed": 3}
        result = pixels(await app.post("/inpaint", **fields))
        assert np.array_equal(result[MASK == 0], IMAGE[MASK == 0])


async def test_multipart_says_the_same_as_json(app: Running) -> None:
    numbers: dict[str, Any] = {"prompt": "a star", "steps": 2, "guidance_scale": 2.5, "seed": 3, "strength": 0.5}
    by_json = await app.post("/inpaint", **numbers, image=b64(png(IMAGE)), mask=b64(png(MASK)))
    form = {name: str(value) for name, value in numbers.items()}
    files = {"image": ("a.png", png(IMAGE), "image/png"), "mask": ("m.png", png(MASK), "image/png")}
    by_form = await app.client.post("/inpaint", data=form, files=files)
    assert np.array_equal(pixels(by_json), pixels(by_form))


async def test_multipart_without_a_file(app: Running) -> None:
    answer = await app.client.post("/generate", files={"prompt": (None, "a cat"), "seed": (None, "3")})
    assert np.array_equal(pixels(answer), pixels(await app.post("/generate", prompt="a cat", seed=3)))


async def test_a_data_uri_is_as_good_as_base64(app: Running) -> None:
    uri = "data:image/png;base64," + b64(png(IMAGE))
    first = await app.post("/edit", prompt="a star", image=uri, seed=3)
    second = await app.post("/edit", prompt="a star", image=b64(png(IMAGE)), seed=3)
    assert np.array_equal(pixels(first), pixels(second))


@pytest.mark.parametrize("name", ["png", "jpeg", "webp"])
async def test_raw_bytes_and_formats(app: Running, name: str) -> None:
    fields = {"prompt": "a cat", "seed": 9}
    raw = await app.client.post("/generate", json=fields, headers={"Accept": f"image/{name}"})
    assert raw.headers["content-type"] == f"image/{name}"
    assert raw.headers["x-seed"] == "9"
    assert re.fullmatch(r"(queue|encode|denoise|decode|total);dur=.*", raw.headers["server-timing"])
    assert Image.open(io.BytesIO(raw.content)).format == name.upper()
    by_json = await app.post("/generate", **fields, output_format=name)
    assert np.array_equal(pixels(by_json), read_pixels(raw.content))


async def test_quality_makes_a_difference(app: Running) -> None:
    sizes = [
        len((await app.post("/generate", prompt="a cat", seed=9, output_format="jpeg", quality=q)).content)
        for q in (5, 100)
    ]
    assert sizes[0] < sizes[1]


async def test_other_prompt_or_guidance_other_image(app: Running) -> None:
    base = pixels(await app.post("/generate", prompt="a cat", seed=9))
    assert not np.array_equal(base, pixels(await app.post("/generate", prompt="a dog", seed=9)))
    assert not np.array_equal(base, pixels(await app.post("/generate", prompt="a cat", seed=9, guidance_scale=8)))


async def test_a_class_bundle_takes_classes(anyio_backend: str, settings: Settings, class_bundle_path: Path) -> None:
    async with running(settings.model_copy(update={"bundle": str(class_bundle_path)})) as app:
        answer = await app.post("/generate", **{"class": "two"}, seed=1)
        assert np.array_equal(pixels(answer), app.pipeline.run([Generate("two", 4, 2.0, 1)])[0])
        able = (await app.client.get("/capabilities")).json()
        assert (able["conditioning"], able["classes"]) == ("class", ["zero", "one", "two", "three"])


async def test_capabilities(app: Running) -> None:
    able = (await app.client.get("/capabilities")).json()
    assert able["students"] == [1, 2, 4]
    assert able["image"] == {"width": SIZE, "height": SIZE}
    assert able["guidance_scale"] == {"minimum": 1.0, "maximum": 8.0, "default": 3.0}
    assert able["strengths"] == {"1": [1.0], "2": [0.5, 1.0], "4": [0.25, 0.5, 0.75, 1.0]}
    assert able["default_strength"] == {"1": 1.0, "2": 0.5, "4": 0.75}
    assert able["tasks"] == ["generate", "edit", "inpaint"]
    assert able["mask_modes"] == ["white", "black", "alpha"]
    assert able["negative_prompt"] is False
    assert able["limits"]["max_prompt_tokens"] == 8
    for steps, values in able["strengths"].items():
        for place, strength in enumerate(values, start=1):
            answer = await app.post(
                "/edit", prompt="a star", image=b64(png(IMAGE)), steps=int(steps), strength=strength
            )
            assert len(answer.json()["batch"]["ticks"]) == place


@pytest.mark.parametrize("offered", ["abc-123", "A.b_c"])
async def test_a_sane_request_id_is_kept(app: Running, offered: str) -> None:
    answer = await app.client.get("/livez", headers={"X-Request-ID": offered})
    assert answer.headers["x-request-id"] == offered


@pytest.mark.parametrize("offered", ["", "a b", "x" * 129, "<script>", "-"])
async def test_another_request_id_is_replaced(app: Running, offered: str) -> None:
    answer = await app.client.get("/livez", headers={"X-Request-ID": offered})
    assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])


async def test_the_page_and_its_files_come_with_a_strict_policy(app: Running) -> None:
    page = await app.client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "img-src 'self' data: blob:" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    script = await app.client.get("/playground/api.js")
    assert script.headers["content-type"] == "text/javascript; charset=utf-8"
    again = await app.client.get("/playground/api.js", headers={"If-None-Match": "*"})
    for answer in (page, script, again):
        assert answer.status_code == 200
        assert answer.headers["cache-control"] == "no-cache"
        assert "etag" not in answer.headers


async def test_every_optional_field_may_be_null(app: Running) -> None:
    given = {"prompt": "a cat", "seed": 3, "image": b64(png(random_image())), "mask": b64(png(box_mask()))}
    for path, model, theirs in (
        ("/edit", EditRequest, False),
        ("/inpaint", InpaintRequest, False),
        ("/v1/images/edits", ImagesEditBody, True),
    ):
        names = {field.alias or name for name, field in model.model_fields.items()}
        fields = {name: value for name, value in given.items() if name in names - ({"mask"} if theirs else set())}
        answer = await app.post(path, **dict.fromkeys(names) | fields)
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["data" if theirs else "images"]) == 1
