"""The stochastic sampler and edits by encoding, through HTTP: offered where the bundle has them, else refused."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engines.pipeline import Edit, Generate, Inpaint, Transfer
from engines.provenance import settings_of
from service.settings import Settings
from tests.bundles import make_tiny_bundle
from tests.service.helpers import SIZE, Running, b64, box_mask, error, pixels, png, random_image, running

pytestmark = pytest.mark.anyio

IMAGE = random_image(1)
MASK = box_mask()


@pytest.fixture(scope="module")
def styled_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose students of 2 and 4 steps are stochastic too; that of 2 has an encoder."""
    folder = tmp_path_factory.mktemp("bundles")
    return make_tiny_bundle(folder, size=SIZE, name="styled", stochastic=(2, 4), encoders=(2,)).path


@pytest.fixture
async def styled(anyio_backend: str, styled_path: Path) -> AsyncIterator[Running]:
    async with running(Settings(bundle=str(styled_path), backend="fake", threads=1)) as this:
        yield this


async def capabilities(app: Running) -> dict[str, Any]:
    found: dict[str, Any] = (await app.client.get("/capabilities")).json()
    return found


async def test_capabilities_say_what_is_offered(styled: Running, app: Running) -> None:
    able = await capabilities(styled)
    assert able["samplers"] == {"deterministic": [1, 2, 4], "stochastic": [4, 8]}
    assert able["edit_methods"] == {"sdedit": [1, 2, 4, 8], "encode": [2]}
    assert able["students"] == [1, 2, 4]
    assert able["strengths"].keys() == able["default_strength"].keys() == {"1", "2", "4", "8"}
    plain = await capabilities(app)
    assert plain["samplers"] == {"deterministic": [1, 2, 4]}
    assert plain["edit_methods"] == {"sdedit": [1, 2, 4]}


async def test_every_endpoint_takes_the_sampler(styled: Running) -> None:
    options = {"guidance_scale": 3.0, "seed": 7, "sampler": "stochastic", "steps": 4}
    image, mask = b64(png(IMAGE)), b64(png(MASK))
    shared: dict[str, Any] = {"prompt": "the sun", **options}
    made = [
        pixels(await styled.post("/generate", **shared)),
        pixels(await styled.post("/edit", image=image, strength=0.5, **shared)),
        pixels(await styled.post("/inpaint", image=image, mask=mask, **shared)),
    ]
    expected = styled.pipeline.run(
        [
            Generate("the sun", 4, 2.0, 7, sampler="stochastic"),
            Edit("the sun", 4, 2.0, 7, IMAGE, 0.5, sampler="stochastic"),
            Inpaint("the sun", 4, 2.0, 7, IMAGE, MASK == 255, sampler="stochastic"),
        ]
    )
    for ours, theirs in zip(made, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    plain = pixels(await styled.post("/generate", **{**shared, "sampler": "deterministic"}))
    assert not np.array_equal(plain, made[0])


async def test_openai_takes_the_sampler_and_the_method(styled: Running) -> None:
    fields: dict[str, Any] = {"prompt": "the sun", "seed": 7, "guidance_scale": 3.0}
    answer = await styled.post("/v1/images/generations", sampler="stochastic", priority="high", **fields)
    ours = await styled.post("/generate", sampler="stochastic", **fields)
    assert answer.json()["data"][0]["b64_json"] == ours.json()["images"][0]["b64_json"]
    encode = {"prompt": "the sun", "image": b64(png(IMAGE)), "method": "encode", "source_prompt": "a cat"}
    answer = await styled.post("/v1/images/edits", **encode)
    ours = await styled.post("/edit", **encode)
    assert answer.json()["data"][0]["b64_json"] == ours.json()["images"][0]["b64_json"]
    masked = await styled.post("/v1/images/edits", mask=b64(png(MASK)), **encode)
    error(masked, 422, "unsupported_option", "method")


async def test_an_edit_by_encoding(styled: Running) -> None:
    answer = await styled.post(
        "/edit", image=b64(png(IMAGE)), prompt="the sun", method="encode", source_prompt="a cat", guidance_scale=3.0
    )
    (expected,) = styled.pipeline.run([Transfer("the sun", 2, 2.0, 0, IMAGE, "a cat")])
    np.testing.assert_array_equal(pixels(answer), expected)
    assert answer.json()["batch"]["ticks"] == [1, 1, 1, 1]


async def test_the_file_says_how_it_was_made_and_it_is_made_so_again(styled: Running) -> None:
    made = await styled.post("/generate", prompt="the sun", sampler="stochastic", steps=4, seed=7)
    data = made.json()["images"][0]["b64_json"]
    edited = await styled.post("/edit", image=data, prompt="a cat", reuse=True, strength=0.5)
    again = await styled.post(
        "/edit", image=data, prompt="a cat", steps=4, seed=7, sampler="stochastic", guidance_scale=3.0, strength=0.5
    )
    np.testing.assert_array_equal(pixels(edited), pixels(again))
    encoded = await styled.post(
        "/edit", image=data, prompt="a cat", method="encode", source_prompt="the sun", metadata="full",
        reuse=True, steps=2,
    )  # fmt: skip
    assert encoded.status_code == 200, encoded.text


async def test_what_was_made_by_encoding_is_made_so_again(styled: Running) -> None:
    fields = {"prompt": "a cat", "method": "encode", "source_prompt": "the sun", "guidance_scale": 4.0}
    said = {}
    for metadata in ("full", "settings"):
        made = await styled.post("/edit", image=b64(png(IMAGE)), metadata=metadata, **fields)
        said[metadata] = made.json()["images"][0]["b64_json"]
    for path in ("/edit", "/v1/images/edits"):
        reused = await styled.post(path, image=said["full"], reuse=True)
        named = await styled.post(path, image=said["full"], steps=2, **fields)
        assert reused.status_code == 200
        images = [next(iter(answer.json().get("images") or answer.json()["data"])) for answer in (reused, named)]
        assert images[0]["b64_json"] == images[1]["b64_json"]
    lacking = await styled.post("/edit", image=said["settings"], prompt="a cat", reuse=True)
    error(lacking, 422, "missing_field", "source_prompt")
    empty = await styled.post("/edit", image=said["full"], source_prompt="", reuse=True)
    error(empty, 422, "empty_prompt", "source_prompt")
    seeds = set()
    for _ in range(3):  # No seed made it, so there is none to take.
        noised = await styled.post("/edit", image=said["settings"], prompt="a cat", reuse=True, method="sdedit")
        assert noised.status_code == 200
        seeds.add(noised.json()["images"][0]["seed"])
    assert len(seeds) == 3


async def test_an_encoded_edit_says_so_in_its_file(styled: Running) -> None:
    answer = await styled.client.post(
        "/edit",
        json={
            "image": b64(png(IMAGE)),
            "prompt": "a cat",
            "method": "encode",
            "source_prompt": "the sun",
            "metadata": "full",
        },
        headers={"Accept": "image/png"},
    )
    found = settings_of(answer.content)
    assert found is not None
    assert (found.task, found.steps, found.sampler, found.strength) == ("edit", 2, "deterministic", None)
    with Image.open(io.BytesIO(answer.content)) as image:
        said = json.loads(image.info["fewstep"])
    assert (said["method"], said["source_prompt"]) == ("encode", "the sun")


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"sampler": "stochastic", "steps": 2}, "unsupported_sampler", "sampler"),
        ({"sampler": "ddpm"}, "invalid_value", "sampler"),
        ({"steps": 8}, "unsupported_steps", "steps"),
        ({"method": "encode"}, "missing_field", "source_prompt"),
        ({"method": "encode", "source_class": "one"}, "unsupported_option", "source_class"),
        ({"method": "encode", "source_prompt": "xyzzy"}, "unknown_words", "source_prompt"),
        ({"method": "encode", "source_prompt": "a cat", "strength": 0.5}, "unsupported_option", "strength"),
        ({"method": "encode", "source_prompt": "a cat", "seed": 5}, "unsupported_option", "seed"),
        ({"method": "encode", "source_prompt": "a cat", "n": 2}, "unsupported_option", "n"),
        ({"method": "encode", "source_prompt": "a cat", "steps": 4}, "unsupported_method", "method"),
        (
            {"method": "encode", "source_prompt": "a cat", "steps": 4, "sampler": "stochastic"},
            "unsupported_method",
            "method",
        ),
        ({"source_prompt": "a cat"}, "unsupported_option", "source_prompt"),
    ],
)
async def test_what_cannot_be_honoured_is_refused(
    styled: Running, fields: dict[str, Any], code: str, param: str
) -> None:
    error(await styled.post("/edit", prompt="the sun", image=b64(png(IMAGE)), **fields), 422, code, param)


async def test_a_bundle_that_has_neither_refuses_both(app: Running) -> None:
    error(await app.post("/generate", prompt="the sun", sampler="stochastic"), 422, "unsupported_sampler", "sampler")
    fields = {"prompt": "the sun", "image": b64(png(IMAGE)), "method": "encode"}
    error(await app.post("/edit", **fields), 422, "unsupported_method", "method")
    mask = b64(png(MASK))
    error(await app.post("/inpaint", mask=mask, **fields), 422, "unknown_field", "method")


async def test_classes_go_where_prompts_do(anyio_backend: str, tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path, "class", size=SIZE, encoders=(4,))
    async with running(Settings(bundle=str(bundle.path), backend="fake", threads=1)) as app:
        fields = {"image": b64(png(IMAGE)), "method": "encode", "class": "one"}
        made = pixels(await app.post("/edit", source_class="two", **fields))
        (expected,) = app.pipeline.run([Transfer("one", 4, 2.0, 0, IMAGE, "two")])
        np.testing.assert_array_equal(made, expected)
        error(await app.post("/edit", **fields), 422, "missing_field", "source_class")
        error(await app.post("/edit", source_class="six", **fields), 422, "unknown_class", "source_class")
        error(await app.post("/edit", source_prompt="a cat", **fields), 422, "unsupported_option", "source_prompt")
        theirs = await app.post("/v1/images/generations", prompt="", seed=3, **{"class": "two"})
        ours = await app.post("/generate", seed=3, **{"class": "two"})
        assert theirs.json()["data"][0]["b64_json"] == ours.json()["images"][0]["b64_json"]
