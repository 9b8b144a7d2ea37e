"""The Python client, blocking and awaited, against the service on a real port."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from PIL import Image

from engines.pipeline import Edit, Generate, Inpaint, Pipeline
from engines.provenance import settings_of
from service.app import create_app
from service.client import AsyncClient, Client, MadeImage, Retries, ServiceError
from service.client.calls import EditOptions, GenerateOptions, InpaintOptions
from service.schemas import EditRequest, GenerateRequest, InpaintRequest
from service.settings import Settings
from tests.service.helpers import (
    SIZE,
    Gate,
    box_mask,
    listening,
    pipeline_of,
    png,
    random_image,
    read_pixels,
    wait_until,
)

IMAGE = random_image(1)
MASK = box_mask()
# What the client gives otherwise, or has no use for: it waits, and takes JSON.
NO_OPTIONS = {"prompt", "image", "mask", "response_format", "asynchronous"}

Ask = Callable[..., Any]


class Served:
    """Where the service is, and its pipeline."""

    def __init__(self, url: str, pipeline: Pipeline) -> None:
        self.url = url
        self.pipeline = pipeline


@pytest.fixture(scope="module")
def served(bundle_path: Path) -> Iterator[Served]:
    app = create_app(Settings(bundle=str(bundle_path), backend="fake", threads=1))
    with listening(app) as port:
        yield Served(f"http://127.0.0.1:{port}", pipeline_of(app.state.service))


def ask_blocking(url: str, method: str, *arguments: Any, **options: Any) -> Any:
    with Client(url) as client:
        return getattr(client, method)(*arguments, **options)


def ask_awaited(url: str, method: str, *arguments: Any, **options: Any) -> Any:
    async def ask() -> Any:
        async with AsyncClient(url) as client:
            return await getattr(client, method)(*arguments, **options)

    return anyio.run(ask)


@pytest.fixture(params=[ask_blocking, ask_awaited], ids=["blocking", "awaited"])
def ask(request: pytest.FixtureRequest) -> Ask:
    """Makes one call with either client."""
    found: Ask = request.param
    return found


def test_generate(served: Served, ask: Ask) -> None:
    made = ask(served.url, "generate", "a red heart", steps=2, guidance_scale=3.5, seed=7, n=2)
    expected = served.pipeline.run([Generate("a red heart", 2, 2.5, seed) for seed in (7, 8)])
    assert [image.seed for image in made.images] == [7, 8]
    for image, pixels in zip(made.images, expected, strict=True):
        assert np.array_equal(np.asarray(image.picture), pixels)
    assert (made.model, made.revision) == ("tiny", served.pipeline.manifest.revision)
    assert made.timings.total_ms > 0
    assert made.request_id


@pytest.mark.parametrize("timeout_s", [float("inf"), 1e300])
def test_no_time_limit_is_too_long(served: Served, timeout_s: float) -> None:
    with Client(served.url, timeout_s=timeout_s) as client:
        assert client.generate("a cat", seed=7).images[0].seed == 7


@pytest.mark.parametrize("form", ["picture", "palette", "bytes", "path", "text"])
def test_images_go_in_in_many_forms(served: Served, ask: Ask, form: str, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(png(IMAGE))
    forms = {
        "picture": Image.fromarray(IMAGE),
        "palette": Image.fromarray(IMAGE).quantize(16),
        "bytes": png(IMAGE),
        "path": path,
        "text": str(path),
    }
    made = ask(served.url, "edit", forms[form], "the sun", strength=0.5, seed=3)
    sent = np.asarray(Image.fromarray(IMAGE).quantize(16).convert("RGB")) if form == "palette" else IMAGE
    expected = served.pipeline.run([Edit("the sun", 4, 2.0, 3, sent, strength=0.5)])[0]
    assert np.array_equal(np.asarray(made.images[0].picture), expected)


def test_a_mode_that_png_lacks_is_converted(served: Served, ask: Ask) -> None:
    made = ask(served.url, "edit", Image.fromarray(IMAGE).convert("CMYK"), "the sun", seed=3)
    assert made.images[0].picture.size == (SIZE, SIZE)


def test_inpaint(served: Served, ask: Ask) -> None:
    made = ask(served.url, "inpaint", Image.fromarray(IMAGE), Image.fromarray(255 - MASK), "a star", seed=3)
    black = ask(served.url, "inpaint", png(IMAGE), png(MASK), "a star", seed=3, mask_mode="black")
    expected = served.pipeline.run([Inpaint("a star", 4, 2.0, 3, IMAGE, MASK == 0)])[0]
    assert np.array_equal(np.asarray(made.images[0].picture), expected)
    assert np.array_equal(np.asarray(black.images[0].picture), expected)
    soft = ask(served.url, "inpaint", png(IMAGE), png(MASK), "a star", seed=3, mask_blur=1.0, grow_mask=-1)
    assert not np.array_equal(np.asarray(soft.images[0].picture), expected)


def test_numbers_may_be_of_another_library(served: Served, ask: Ask) -> None:
    made = ask(served.url, "generate", "a cat", steps=np.int64(2), seed=np.uint32(77), guidance_scale=np.float32(1.5))
    expected = served.pipeline.run([Generate("a cat", 2, 0.5, 77)])[0]
    assert np.array_equal(np.asarray(made.images[0].picture), expected)
    for seed in (object(), b"7", np.array([7])):
        with pytest.raises(ValueError, match="cannot be sent"):
            ask(served.url, "generate", "a cat", seed=seed)


def test_what_was_made_goes_in_again_with_its_settings(served: Served, ask: Ask, tmp_path: Path) -> None:
    made = ask(served.url, "generate", "a cat", steps=2, seed=77, metadata="full").images[0]
    assert isinstance(made, MadeImage)
    edited = ask(served.url, "edit", made, "a dog", reuse=True).images[0]
    assert edited.seed == 77
    made.save(tmp_path / "cat.png")
    found = settings_of((tmp_path / "cat.png").read_bytes())
    assert found is not None
    assert (found.prompt, found.steps) == ("a cat", 2)


def test_models_and_capabilities(served: Served, ask: Ask) -> None:
    [model] = ask(served.url, "models").models
    assert (model.name, model.loaded, model.default) == ("tiny", True, True)
    able = ask(served.url, "capabilities")
    assert able.image.width == SIZE
    assert ask(served.url, "capabilities", f"tiny@{model.revision}") == able
    assert ask(served.url, "load", "tiny").loaded


def test_load_and_unload(bundle_path: Path, ask: Ask) -> None:
    app = create_app(Settings(bundle=str(bundle_path), backend="fake", threads=1))
    with listening(app) as port:
        url = f"http://127.0.0.1:{port}"
        assert not ask(url, "unload", "tiny").loaded
        assert ask(url, "load", "tiny").loaded


@pytest.mark.parametrize(
    ("method", "arguments", "options", "status", "code", "param"),
    [
        ("generate", ("a cat",), {"steps": 3}, 422, "unsupported_steps", "steps"),
        ("generate", ("a cat",), {"class_name": "one"}, 422, "unsupported_option", "class"),
        ("generate", ("a cat",), {"model": "sdxl"}, 404, "model_not_found", "model"),
        ("generate", (), {}, 422, "missing_field", "prompt"),
        ("edit", (b"hello", "a cat"), {}, 400, "undecodable", "image"),
        ("load", ("a?b c",), {}, 404, "model_not_found", "model"),
        ("capabilities", ("sdxl",), {}, 404, "model_not_found", "model"),
    ],
)
def test_what_the_service_refuses_is_a_clear_error(
    served: Served, ask: Ask, method: str, arguments: Any, options: Any, status: int, code: str, param: str
) -> None:
    with pytest.raises(ServiceError) as caught:
        ask(served.url, method, *arguments, **options)
    error = caught.value
    assert (error.status, error.code, error.param, error.retryable) == (status, code, param, False)
    assert error.request_id
    assert error.request_id in str(error)
    assert error.message in str(error)


def test_a_full_service_is_asked_again_when_it_says(
    bundle_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Ask
) -> None:
    app = create_app(Settings(bundle=str(bundle_path), backend="fake", max_inflight=1))
    with listening(app) as port, ThreadPoolExecutor(1) as threads:
        url = f"http://127.0.0.1:{port}"
        gate = Gate(pipeline_of(app.state.service), monkeypatch)
        first = threads.submit(ask_blocking, url, "generate", "a cat")
        assert gate.reached.wait(60)
        with Client(url, retries=Retries(tries=1)) as once, pytest.raises(ServiceError) as caught:
            once.generate("a cat")
        assert (caught.value.code, caught.value.retryable) == ("too_many_requests", True)
        assert (caught.value.retry_after_s or 0) >= 1
        threading.Timer(0.5, gate.opened.set).start()
        assert ask(url, "generate", "a cat", seed=5).images[0].seed == 5
        assert first.result(60).images


def test_a_call_that_is_cancelled_is_dropped_by_the_service(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = create_app(Settings(bundle=str(bundle_path), backend="fake"))
    service = app.state.service
    with listening(app) as port:
        gate = Gate(pipeline_of(service), monkeypatch)

        url = f"http://127.0.0.1:{port}"

        async def ask_and_leave() -> None:
            async with AsyncClient(url, retries=Retries(tries=1)) as client, anyio.create_task_group() as group:
                group.start_soon(client.generate, "a cat")
                assert await anyio.to_thread.run_sync(gate.reached.wait, 20)
                assert service.inflight == 1
                group.cancel_scope.cancel()

        try:
            anyio.run(ask_and_leave)
            wait_until(lambda: service.inflight == 0)
        finally:
            gate.opened.set()


def test_jpeg_comes_out_as_it_was_made(served: Served, ask: Ask) -> None:
    made = ask(served.url, "generate", "a cat", seed=5, output_format="jpeg", quality=50).images[0]
    assert made.data[:3] == b"\xff\xd8\xff"
    assert np.array_equal(np.asarray(made.picture), read_pixels(made.data))


@pytest.mark.parametrize(
    ("options", "model"),
    [(GenerateOptions, GenerateRequest), (EditOptions, EditRequest), (InpaintOptions, InpaintRequest)],
    ids=["generate", "edit", "inpaint"],
)
def test_the_options_are_those_of_the_service(options: Any, model: type[GenerateRequest]) -> None:
    assert options.__optional_keys__ == model.model_fields.keys() - NO_OPTIONS
