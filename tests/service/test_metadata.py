"""What the files of the service's images say, and that an edit can take its settings from there."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engines.images import ImageFormat, encode_image
from engines.provenance import describe_image, settings_of
from engines.tasks import Transfer
from service.settings import MOST_PROMPT_CHARS
from tests.service.helpers import Running, b64, box_mask, error, pixels, png, random_image

pytestmark = pytest.mark.anyio


def file_of(answer: Any, index: int = 0) -> bytes:
    return base64.b64decode(answer.json()["images"][index]["b64_json"])


async def test_every_png_says_how_it_was_made_but_for_the_prompt(app: Running) -> None:
    answer = await app.post("/generate", prompt="a cat", steps=2, guidance_scale=3.5, seed=7, n=2)
    for index in range(2):
        text = Image.open(io.BytesIO(file_of(answer, index))).info["fewstep"]
        fields = json.loads(text)
        assert fields["digital_source_type"].endswith("/trainedAlgorithmicMedia")
        assert fields["software"].startswith("fewstep ")
        del fields["digital_source_type"], fields["software"]
        assert fields == {
            "model": "tiny",
            "revision": app.pipeline.manifest.revision,
            "task": "generate",
            "steps": 2,
            "sampler": "deterministic",
            "guidance_scale": 3.5,
            "seed": 7 + index,
        }


async def test_the_prompt_when_it_is_asked_for_and_nothing_when_that_is(app: Running) -> None:
    image = {"image": b64(png(random_image())), "mask": b64(png(box_mask()))}
    full = settings_of(file_of(await app.post("/inpaint", prompt="a cat", metadata="full", strength=0.5, **image)))
    assert full is not None
    assert (full.prompt, full.task, full.strength) == ("a cat", "inpaint", 0.5)
    for output_format in ("png", "jpeg", "webp"):
        bare = await app.post("/generate", prompt="a cat", metadata="none", output_format=output_format)
        assert settings_of(file_of(bare)) is None
    error(await app.post("/generate", prompt="a cat", metadata="some"), 422, "invalid_value", "metadata")


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
async def test_an_edit_reuses_what_its_image_says(app: Running, output_format: str) -> None:
    fields = {"steps": 2, "guidance_scale": 4.5, "seed": 99}
    made = file_of(await app.post("/generate", prompt="a cat", output_format=output_format, **fields))
    reused = await app.post("/edit", prompt="a dog", image=b64(made), reuse=True)
    named = await app.post("/edit", prompt="a dog", image=b64(made), **fields)
    assert np.array_equal(pixels(reused), pixels(named))
    assert reused.json()["images"][0]["seed"] == 99
    by_form = await app.client.post("/edit", data={"prompt": "a dog", "reuse": "true"}, files={"image": made})
    assert np.array_equal(pixels(by_form), pixels(named))


async def test_an_edit_reuses_the_prompt_and_the_strength_of_a_file_that_has_them(app: Running) -> None:
    fields = {"prompt": "a cat", "steps": 4, "guidance_scale": 4.5, "seed": 99, "strength": 0.5}
    made = file_of(await app.post("/edit", image=b64(png(random_image())), metadata="full", **fields))
    reused = await app.post("/edit", image=b64(made), reuse=True)
    named = await app.post("/edit", image=b64(made), **fields)
    assert np.array_equal(pixels(reused), pixels(named))
    without = file_of(await app.post("/generate", prompt="a cat"))
    error(await app.post("/edit", image=b64(without), reuse=True), 422, "missing_field", "prompt")


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("letter", ["\U0001f600", "\x01", '"'])
async def test_the_longest_prompts_fit_in_every_file(app: Running, output_format: ImageFormat, letter: str) -> None:
    image, longest = random_image(), letter * MOST_PROMPT_CHARS
    task = Transfer(longest, 4, 2.0, 7, image=image, source=longest)
    said = settings_of(encode_image(image, output_format, text=describe_image(task, app.pipeline.manifest, "full")))
    assert said is not None
    assert (said.prompt, said.source_prompt) == (longest, longest)


@pytest.mark.parametrize(
    ("value", "headers"),
    [
        ("a caf\u00e9 cat".encode(), (b"Content-Transfer-Encoding: 8bit", b"Content-Type: text/plain; charset=UTF-8")),
        (b"a caf\xe9 cat", (b"Content-Type: text/plain; charset=ISO-8859-1",)),
    ],
)
async def test_a_part_may_say_how_its_text_is_written(app: Running, value: bytes, headers: tuple[bytes, ...]) -> None:
    head = b"\r\n".join((b'Content-Disposition: form-data; name="prompt"', *headers))
    full = b'Content-Disposition: form-data; name="metadata"\r\n\r\nfull'
    form = b"--b\r\n" + head + b"\r\n\r\n" + value + b"\r\n--b\r\n" + full + b"\r\n--b--\r\n"
    sent = {"Content-Type": "multipart/form-data; boundary=b", "Accept": "image/png"}
    answer = await app.client.post("/generate", content=form, headers=sent)
    assert answer.status_code == 200, answer.text
    said = settings_of(answer.content)
    assert said is not None
    assert said.prompt == "a caf\u00e9 cat"


async def test_what_a_request_names_goes_before_what_its_image_says(app: Running) -> None:
    made = b64(file_of(await app.post("/generate", prompt="a cat", steps=2, guidance_scale=4.5, seed=99)))
    first = await app.post("/edit", prompt="a dog", image=made, reuse=True, seed=5, steps=4)
    second = await app.post("/edit", prompt="a dog", image=made, guidance_scale=4.5, seed=5, steps=4)
    assert np.array_equal(pixels(first), pixels(second))


async def test_without_reuse_an_image_settles_nothing(app: Running) -> None:
    made = b64(file_of(await app.post("/generate", prompt="a cat", steps=2, guidance_scale=4.5, seed=99)))
    plain = await app.post("/edit", prompt="a dog", image=made, seed=5)
    named = await app.post("/edit", prompt="a dog", image=made, seed=5, steps=4, guidance_scale=3.0)
    assert np.array_equal(pixels(plain), pixels(named))


@pytest.mark.parametrize(
    ("says", "code", "param"),
    [
        ({"steps": 3}, "unsupported_steps", "steps"),
        ({"guidance_scale": 99.0}, "guidance_out_of_range", "guidance_scale"),
        ({"seed": 2**53}, "seed_out_of_range", "seed"),
        ({"seed": "7"}, "no_metadata", "reuse"),
        ({"strength": 7.0}, "strength_out_of_range", "strength"),
        ({"strength": -1.0}, "strength_out_of_range", "strength"),
    ],
)
async def test_what_an_image_says_is_checked_as_what_a_client_says(
    app: Running, says: dict[str, Any], code: str, param: str
) -> None:
    text = {"model": "m", "revision": "r", "steps": 4, "guidance_scale": 3.0, "seed": 7} | says
    image = encode_image(random_image(), "png", text={"fewstep": json.dumps(text)})
    error(await app.post("/edit", prompt="a dog", image=b64(image), reuse=True), 422, code, param)


async def test_what_a_png_says_behind_its_pixels_is_read_too(app: Running) -> None:
    made = file_of(await app.post("/generate", prompt="a cat", seed=7, steps=2))
    chunks = list(chunks_of(made))
    late = [chunk for chunk in chunks if chunk[4:8] == b"iTXt"]
    moved = [*(chunk for chunk in chunks[:-1] if chunk not in late), *late, chunks[-1]]
    answer = await app.post("/edit", prompt="a dog", image=b64(made[:8] + b"".join(moved)), reuse=True)
    assert (answer.status_code, answer.json()["images"][0]["seed"]) == (200, 7)


def chunks_of(data: bytes) -> Iterator[bytes]:
    """Those of a PNG, each with its length, its name and its checksum."""
    place = 8
    while place < len(data):
        size = 12 + int.from_bytes(data[place : place + 4], "big")
        yield data[place : place + size]
        place += size


async def test_an_image_that_says_nothing_cannot_be_reused(app: Running) -> None:
    error(
        await app.post("/edit", prompt="a dog", image=b64(png(random_image())), reuse=True), 422, "no_metadata", "reuse"
    )
    broken = await app.post("/edit", prompt="a dog", image=b64(b"hello"), reuse=True)
    error(broken, 400, "undecodable", "image")
