"""OpenAI's endpoints, driven by their own client on a real port."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from engines.pipeline import Edit, Generate, Inpaint, Pipeline
from engines.provenance import settings_of
from service.app import create_app
from service.settings import Settings
from tests.service.helpers import (
    SIZE,
    Gate,
    Pixels,
    b64,
    box_mask,
    listening,
    pipeline_of,
    png,
    random_image,
    read_pixels,
)

IMAGE = random_image(1)
MASK = box_mask()
CLEAR = np.dstack([IMAGE, np.where(MASK > 0, 0, 255).astype(np.uint8)])


class Served:
    """A client of theirs, and the pipeline it reaches in the end."""

    def __init__(self, port: int, pipeline: Pipeline) -> None:
        self.root = f"http://127.0.0.1:{port}"
        self.pipeline = pipeline
        self.client = openai.OpenAI(base_url=f"{self.root}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def served(bundle_path: Path) -> Iterator[Served]:
    app = create_app(Settings(bundle=str(bundle_path), backend="fake", threads=1, max_image_bytes=20_000))
    with listening(app) as port:
        this = Served(port, pipeline_of(app.state.service))
        with this.client:
            yield this


def bytes_of(answer: openai.types.ImagesResponse, index: int = 0) -> bytes:
    assert answer.data is not None
    text = answer.data[index].b64_json
    assert text is not None
    return base64.b64decode(text)


def pixels(answer: openai.types.ImagesResponse, index: int = 0) -> Pixels:
    return read_pixels(bytes_of(answer, index))


def file(data: Pixels, name: str = "image.png") -> tuple[str, bytes, str]:
    return name, png(data), "image/png"


def test_generations(served: Served) -> None:
    answer = served.client.images.generate(
        prompt="a red heart",
        model="tiny",
        n=2,
        size="16x16",  # type: ignore[arg-type, unused-ignore]
        response_format="b64_json",
        extra_body={"steps": 2, "guidance_scale": 3.5, "seed": 7},
    )
    expected = served.pipeline.run([Generate("a red heart", 2, 2.5, seed) for seed in (7, 8)])
    assert answer.data is not None
    assert len(answer.data) == 2
    for index in range(2):
        assert np.array_equal(pixels(answer, index), expected[index])
        assert answer.data[index].seed == 7 + index  # type: ignore[attr-defined]
    assert (answer.output_format, answer.size, answer.background) == ("png", f"{SIZE}x{SIZE}", "opaque")
    assert answer.created > 1_700_000_000


def test_what_asks_for_nothing_changes_nothing(served: Served) -> None:
    plain = served.client.images.generate(prompt="a cat", extra_body={"seed": 7})
    full = served.client.images.generate(
        prompt="a cat",
        n=1,
        size="auto",
        quality="auto",
        background="opaque",
        moderation="auto",
        output_format="png",
        stream=False,
        partial_images=0,
        user="someone",
        safety_identifier="someone",
        extra_body={"seed": 7},
    )
    assert np.array_equal(pixels(plain), pixels(full))


def test_formats_and_compression(served: Served) -> None:
    sizes = {}
    for compression in (5, 100):
        answer = served.client.images.generate(
            prompt="a cat", output_format="jpeg", output_compression=compression, extra_body={"seed": 7}
        )
        assert answer.output_format == "jpeg"
        assert bytes_of(answer)[:3] == b"\xff\xd8\xff"
        sizes[compression] = len(bytes_of(answer))
    assert sizes[5] < sizes[100]


@pytest.mark.parametrize("listed", [False, True], ids=["image", "image[]"])
def test_an_edit_without_a_mask(served: Served, listed: bool) -> None:
    image = file(IMAGE)
    answer = served.client.images.edit(
        image=[image] if listed else image, prompt="the sun", extra_body={"strength": 0.5, "seed": 3}
    )
    assert np.array_equal(pixels(answer), served.pipeline.run([Edit("the sun", 4, 2.0, 3, IMAGE, strength=0.5)])[0])


def test_an_edit_with_a_mask_repaints_what_is_transparent_and_keeps_the_rest(served: Served) -> None:
    answer = served.client.images.edit(
        image=file(IMAGE), mask=file(CLEAR, "mask.png"), prompt="a star", n=2, extra_body={"seed": 3}
    )
    for index in range(2):
        expected = served.pipeline.run([Inpaint("a star", 4, 2.0, 3 + index, IMAGE, MASK > 0)])[0]
        assert np.array_equal(pixels(answer, index), expected)
        assert np.array_equal(pixels(answer, index)[MASK == 0], IMAGE[MASK == 0])


def test_options_of_the_mask(served: Served) -> None:
    def ask(mask: Pixels, **options: Any) -> Pixels:
        body = {"seed": 3, **options}
        return pixels(served.client.images.edit(image=file(IMAGE), mask=file(mask), prompt="a star", extra_body=body))

    assert np.array_equal(ask(CLEAR), ask(MASK, mask_mode="white"))
    assert not np.array_equal(ask(CLEAR), ask(CLEAR, grow_mask=2))
    assert not np.array_equal(ask(CLEAR), ask(CLEAR, mask_blur=1.5))


def test_metadata_and_reuse(served: Served) -> None:
    made = bytes_of(
        served.client.images.generate(prompt="a cat", extra_body={"seed": 5, "steps": 2, "metadata": "full"})
    )
    found = settings_of(made)
    assert found is not None
    assert (found.prompt, found.seed, found.steps) == ("a cat", 5, 2)
    edited = served.client.images.edit(image=made, prompt="a dog", extra_body={"reuse": True})
    assert edited.data is not None
    assert edited.data[0].seed == 5  # type: ignore[attr-defined]
    again = served.client.images.edit(image=made, prompt="", extra_body={"reuse": True, "metadata": "full"})
    reused = settings_of(bytes_of(again))
    assert reused is not None
    assert reused.prompt == "a cat"


def test_a_request_with_a_key_runs_once(served: Served) -> None:
    headers = {"Idempotency-Key": "once", "Prefer": "respond-async"}
    seeds = []
    for _ in range(2):
        answer = served.client.images.generate(prompt="a cat", extra_headers=headers)
        assert answer.data is not None
        seeds.append(answer.data[0].seed)  # type: ignore[attr-defined]
    assert seeds[0] == seeds[1]


def test_edits_in_json_too(served: Served) -> None:
    fields = {"prompt": "a star", "seed": 3, "image": b64(png(IMAGE)), "mask": b64(png(CLEAR))}
    answer = httpx.post(f"{served.root}/v1/images/edits", json=fields)
    assert answer.status_code == 200
    found = read_pixels(base64.b64decode(answer.json()["data"][0]["b64_json"]))
    assert np.array_equal(found, served.pipeline.run([Inpaint("a star", 4, 2.0, 3, IMAGE, MASK > 0)])[0])


def test_models(served: Served) -> None:
    listed = list(served.client.models.list())
    assert [model.id for model in listed] == ["tiny"]
    assert (listed[0].object, listed[0].owned_by) == ("model", "fewstep")
    assert listed[0].created >= 0
    assert served.client.models.retrieve("tiny") == listed[0]
    exact = served.pipeline.manifest.model
    assert served.client.models.retrieve(exact).id == exact
    with pytest.raises(openai.NotFoundError) as caught:
        served.client.models.retrieve("dall-e-3")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


GENERATIONS: list[tuple[dict[str, Any], type[openai.APIStatusError], str, str]] = [
    ({"response_format": "url"}, openai.UnprocessableEntityError, "unsupported_option", "response_format"),
    ({"quality": "high"}, openai.UnprocessableEntityError, "unsupported_option", "quality"),
    ({"background": "transparent"}, openai.UnprocessableEntityError, "unsupported_option", "background"),
    ({"moderation": "low"}, openai.UnprocessableEntityError, "unsupported_option", "moderation"),
    ({"stream": True}, openai.UnprocessableEntityError, "unsupported_option", "stream"),
    ({"partial_images": 2}, openai.UnprocessableEntityError, "unsupported_option", "partial_images"),
    ({"extra_body": {"width": 16}}, openai.UnprocessableEntityError, "unknown_field", "width"),
    ({"style": "vivid"}, openai.UnprocessableEntityError, "unknown_field", "style"),
    ({"size": "1024x1024"}, openai.UnprocessableEntityError, "unsupported_option", "size"),
    ({"size": "large"}, openai.UnprocessableEntityError, "invalid_value", "size"),
    ({"output_compression": 50}, openai.UnprocessableEntityError, "unsupported_option", "output_compression"),
    ({"output_format": "gif"}, openai.UnprocessableEntityError, "invalid_value", "output_format"),
    ({"n": 0}, openai.UnprocessableEntityError, "invalid_value", "n"),
    ({"n": 9}, openai.UnprocessableEntityError, "too_many_images", "n"),
    ({"prompt": ""}, openai.UnprocessableEntityError, "empty_prompt", "prompt"),
    ({"extra_body": {"steps": 3}}, openai.UnprocessableEntityError, "unsupported_steps", "steps"),
    ({"extra_body": {"scheduler": "ddim"}}, openai.UnprocessableEntityError, "unknown_field", "scheduler"),
    ({"extra_body": {"sampler": "ddim"}}, openai.UnprocessableEntityError, "invalid_value", "sampler"),
    ({"extra_body": {"sampler": "stochastic"}}, openai.UnprocessableEntityError, "unsupported_sampler", "sampler"),
    ({"extra_body": {"class": "one"}}, openai.UnprocessableEntityError, "unsupported_option", "class"),
    ({"model": "dall-e-3"}, openai.NotFoundError, "model_not_found", "model"),
]


@pytest.mark.parametrize(("fields", "kind", "code", "param"), GENERATIONS, ids=lambda value: str(value)[:40])
def test_what_cannot_be_honoured_is_refused(
    served: Served, fields: dict[str, Any], kind: type[openai.APIStatusError], code: str, param: str
) -> None:
    options = {"prompt": "a cat"} | fields
    with pytest.raises(kind) as caught:
        served.client.images.generate(**options)
    problem = caught.value
    assert (problem.code, problem.param, problem.type) == (code, param, "invalid_request_error")
    assert problem.request_id


EDITS: list[tuple[dict[str, Any], type[openai.APIStatusError], str, str | None]] = [
    ({"image": ("a.png", b"hello")}, openai.BadRequestError, "undecodable", "image"),
    ({"mask": file(MASK)}, openai.UnprocessableEntityError, "mask_without_alpha", "mask"),
    ({"mask": file(CLEAR[:8])}, openai.UnprocessableEntityError, "mask_size", "mask"),
    ({"input_fidelity": "high"}, openai.UnprocessableEntityError, "unknown_field", "input_fidelity"),
    ({"image": [file(IMAGE), file(IMAGE)]}, openai.UnprocessableEntityError, "duplicate_field", "image[]"),
    ({"image": [file(IMAGE)] * 5}, openai.BadRequestError, "invalid_multipart", None),
    ({"extra_body": {"mask_blur": 2}}, openai.UnprocessableEntityError, "missing_field", "mask"),
    ({"extra_body": {"strength": 0.1}}, openai.UnprocessableEntityError, "strength_leaves_no_step", "strength"),
    ({"extra_body": {"reuse": True}}, openai.UnprocessableEntityError, "no_metadata", "reuse"),
]


@pytest.mark.parametrize(("fields", "kind", "code", "param"), EDITS, ids=lambda value: str(value)[:40])
def test_edits_that_cannot_be_honoured_are_refused(
    served: Served, fields: dict[str, Any], kind: type[openai.APIStatusError], code: str, param: str | None
) -> None:
    options: dict[str, Any] = {"prompt": "a cat", "image": file(IMAGE)} | fields
    with pytest.raises(kind) as caught:
        served.client.images.edit(**options)
    assert (caught.value.code, caught.value.param) == (code, param)


def test_too_large_an_image(served: Served) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        served.client.images.edit(image=io.BytesIO(png(random_image(size=120))), prompt="a cat")
    assert (caught.value.status_code, caught.value.code) == (413, "too_many_bytes")


def test_two_ways_of_naming_the_image_are_not_mixed(served: Served) -> None:
    files = {"image": png(IMAGE), "image[]": png(IMAGE)}
    answer = httpx.post(f"{served.root}/v1/images/edits", data={"prompt": "a cat"}, files=files)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "duplicate_field")


def test_a_service_that_is_full_makes_their_client_wait_and_try_again(
    bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = create_app(Settings(bundle=str(bundle_path), backend="fake", max_inflight=1))
    with listening(app) as port, ThreadPoolExecutor(1) as threads:
        gate = Gate(pipeline_of(app.state.service), monkeypatch)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=8)
        with client:
            first = threads.submit(client.images.generate, prompt="a cat")
            assert gate.reached.wait(60)
            with pytest.raises(openai.RateLimitError) as caught:
                client.with_options(max_retries=0).images.generate(prompt="a cat")
            assert (caught.value.type, caught.value.code) == ("overloaded_error", "too_many_requests")
            assert int(caught.value.response.headers["retry-after"]) >= 1
            threading.Timer(0.5, gate.opened.set).start()
            assert client.images.generate(prompt="a cat").data
            assert first.result(60).data


def test_what_would_fail_again_is_not_tried_again_by_their_client(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def broken(image: Pixels, *_: object, **__: object) -> bytes:
        tried.append(image)
        raise ValueError("EXIF data is too long")

    monkeypatch.setattr("service.batching.finisher.encode_image", broken)
    with pytest.raises(openai.InternalServerError) as caught:
        served.client.with_options(max_retries=3).images.generate(prompt="a cat")
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert len(tried) == 1


@pytest.mark.anyio
async def test_their_asynchronous_client(served: Served) -> None:
    async with openai.AsyncOpenAI(base_url=f"{served.root}/v1", api_key="none", max_retries=0) as client:
        made = await client.images.generate(prompt="a cat", extra_body={"seed": 7})
        edited = await client.images.edit(image=file(IMAGE), prompt="the sun", extra_body={"seed": 3})
        assert [model.id async for model in client.models.list()] == ["tiny"]
        with pytest.raises(openai.UnprocessableEntityError):
            await client.images.generate(prompt="a cat", response_format="url")
    assert np.array_equal(pixels(made), served.pipeline.run([Generate("a cat", 4, 2.0, 7)])[0])
    assert np.array_equal(pixels(edited), served.pipeline.run([Edit("the sun", 4, 2.0, 3, IMAGE, strength=0.75)])[0])
