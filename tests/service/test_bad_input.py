"""Every bad request is a clear 4xx in the one shape, and nothing is queued for it."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from service.jobs import Job
from service.queue.memory import MemoryQueue
from service.settings import Settings
from tests.service.helpers import SIZE, Running, b64, box_mask, error, png, random_image, running

pytestmark = pytest.mark.anyio

IMAGE = png(random_image())
MASK = png(box_mask())
MAX_PIXELS = 40 * 40
MAX_IMAGE_BYTES = 4000
MAX_BODY_BYTES = 20_000


class CountingQueue(MemoryQueue):
    """Counts what reaches it."""

    submitted = 0

    async def submit(self, job: Job) -> None:
        self.submitted += 1
        await super().submit(job)


@pytest.fixture
async def app(anyio_backend: str, settings: Settings) -> AsyncIterator[Running]:
    """An app with low limits, whose queue must stay untouched."""
    low = settings.model_copy(
        update={
            "max_pixels": MAX_PIXELS,
            "max_image_bytes": MAX_IMAGE_BYTES,
            "max_body_bytes": MAX_BODY_BYTES,
            "max_prompt_chars": 100,
            "max_timeout_ms": 60_000,
        }
    )
    queue = CountingQueue(100)
    async with running(low, queue=queue) as this:
        yield this
        assert queue.submitted == 0


@dataclass
class Case:
    """Fields on top of a good request, and the answer they get."""

    name: str
    fields: dict[str, Any]
    code: str
    param: str | None
    status: int = 422
    path: str = "/generate"
    says: str = ""
    drop: tuple[str, ...] = field(default=())


def frames() -> bytes:
    file = io.BytesIO()
    first, second = (Image.fromarray(random_image(seed)) for seed in (1, 2))
    first.save(file, "webp", save_all=True, append_images=[second])
    return file.getvalue()


def bomb() -> bytes:
    """A PNG whose header promises far more pixels than it holds."""
    data = bytearray(png(np.zeros((1, 1, 3), dtype=np.uint8)))
    data[16:24] = (30_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def dot() -> bytes:
    """A mask of one pixel."""
    mask = np.zeros((SIZE, SIZE), dtype=np.uint8)
    mask[SIZE // 2, SIZE // 2] = 255
    return png(mask)


WIDE = png(np.zeros((40, 41, 3), dtype=np.uint8))
GENERATE = [
    Case("unknown field", {"scheduler": "ddim"}, "unknown_field", "scheduler"),
    Case("unknown field with a lone surrogate", {"\ud800": 1}, "invalid_value", None),
    Case("image where none belongs", {"image": b64(IMAGE)}, "unknown_field", "image"),
    Case("no prompt", {}, "missing_field", "prompt", drop=("prompt",)),
    Case("prompt null", {"prompt": None}, "missing_field", "prompt"),
    Case("prompt a number", {"prompt": 7}, "invalid_value", "prompt"),
    Case("prompt a list", {"prompt": ["a cat"]}, "invalid_value", "prompt"),
    Case("prompt empty", {"prompt": ""}, "empty_prompt", "prompt"),
    Case("prompt blank", {"prompt": " \t\n"}, "empty_prompt", "prompt"),
    Case("prompt a lone surrogate", {"prompt": "a \ud800"}, "invalid_prompt", "prompt"),
    Case("prompt of too many characters", {"prompt": "a " * 51}, "prompt_too_long", "prompt", says="100"),
    Case("prompt of too many tokens", {"prompt": "a cat " * 9}, "prompt_too_long", "prompt", says="8"),
    Case("class for a text bundle", {"class": "one"}, "unsupported_option", "class"),
    Case("negative prompt", {"negative_prompt": "blurry"}, "unsupported_option", "negative_prompt"),
    Case("steps that no student has", {"steps": 3}, "unsupported_steps", "steps", says="1, 2, 4"),
    Case("steps zero", {"steps": 0}, "unsupported_steps", "steps"),
    Case("steps huge", {"steps": 10**30}, "unsupported_steps", "steps"),
    Case("steps text", {"steps": "4"}, "invalid_value", "steps"),
    Case("steps a boolean", {"steps": True}, "invalid_value", "steps"),
    Case("steps a fraction", {"steps": 4.5}, "invalid_value", "steps"),
    Case("guidance too low", {"guidance_scale": 0.5}, "guidance_out_of_range", "guidance_scale", says="1 to 8"),
    Case("guidance too high", {"guidance_scale": 8.01}, "guidance_out_of_range", "guidance_scale"),
    Case("guidance overflowing", {"guidance_scale": 10**400}, "invalid_value", "guidance_scale"),
    Case("guidance a boolean", {"guidance_scale": True}, "invalid_value", "guidance_scale"),
    Case("seed negative", {"seed": -1}, "invalid_value", "seed"),
    Case("seed too large", {"seed": 2**53}, "invalid_value", "seed"),
    Case("seed of the last image too large", {"seed": 2**53 - 1, "n": 2}, "seed_out_of_range", "seed"),
    Case("seed a boolean", {"seed": True}, "invalid_value", "seed"),
    Case("seed a fraction", {"seed": 1.5}, "invalid_value", "seed"),
    Case("no images", {"n": 0}, "invalid_value", "n"),
    Case("too many images", {"n": 9}, "too_many_images", "n", says="8"),
    Case("another width", {"width": SIZE + 1}, "unsupported_option", "width", says=f"{SIZE}"),
    Case("another height", {"height": 0}, "unsupported_option", "height"),
    Case("another model", {"model": "sdxl"}, "model_not_found", "model", status=404),
    Case("another format", {"output_format": "gif"}, "invalid_value", "output_format"),
    Case("quality of png", {"quality": 90}, "unsupported_option", "quality"),
    Case("quality zero", {"output_format": "jpeg", "quality": 0}, "invalid_value", "quality"),
    Case("urls as answer", {"response_format": "url"}, "invalid_value", "response_format"),
    Case("no such priority", {"priority": "urgent"}, "invalid_value", "priority"),
    Case("no time", {"timeout_ms": 0}, "invalid_value", "timeout_ms"),
    Case("too much time", {"timeout_ms": 60_001}, "invalid_value", "timeout_ms", says="60000"),
]
EDIT = [
    Case("no image", {}, "missing_field", "image", drop=("image",)),
    Case("image null", {"image": None}, "invalid_value", "image"),
    Case("image a number", {"image": 7}, "invalid_value", "image"),
    Case("image not base64", {"image": "@@@@"}, "invalid_base64", "image", status=400),
    Case("image of cut base64", {"image": b64(IMAGE)[:-3]}, "invalid_base64", "image", status=400),
    Case("image a URL", {"image": "https://example.org/a.png"}, "invalid_base64", "image", status=400),
    Case("image another data URI", {"image": "data:text/html,hello"}, "invalid_base64", "image", status=400),
    Case("image not ASCII", {"image": "größe"}, "invalid_base64", "image", status=400),
    Case("image empty", {"image": ""}, "undecodable", "image", status=400),
    Case("image no image", {"image": b64(b"hello")}, "undecodable", "image", status=400),
    Case("image cut short", {"image": b64(IMAGE[:200])}, "undecodable", "image", status=400),
    Case("image an animation", {"image": b64(frames())}, "animated", "image"),
    Case("image of too many bytes", {"image": b64(IMAGE * 6)}, "too_many_bytes", "image", status=413),
    Case("image of too many pixels", {"image": b64(WIDE)}, "too_many_pixels", "image", status=413),
    Case("image a bomb", {"image": b64(bomb())}, "too_many_pixels", "image", status=413),
    Case("mask where none belongs", {"mask": b64(MASK)}, "unknown_field", "mask"),
    Case("strength zero", {"strength": 0}, "invalid_value", "strength"),
    Case("strength above one", {"strength": 1.01}, "invalid_value", "strength"),
    Case("strength that leaves no step", {"strength": 0.2}, "strength_leaves_no_step", "strength", says="0.25"),
    Case("strength for one step", {"steps": 1, "strength": 0.9}, "strength_leaves_no_step", "strength"),
]
INPAINT = [
    Case("no mask", {}, "missing_field", "mask", drop=("mask",)),
    Case("mask of another size", {"mask": b64(png(box_mask(8)))}, "mask_size", "mask"),
    Case("mask empty", {"mask": b64(png(box_mask(part=0)))}, "empty_mask", "mask"),
    Case("mask empty in black", {"mask": b64(png(box_mask(part=1))), "mask_mode": "black"}, "empty_mask", "mask"),
    Case("mask without alpha", {"mask_mode": "alpha"}, "mask_without_alpha", "mask"),
    Case("mask no image", {"mask": b64(b"hello")}, "undecodable", "mask", status=400),
    Case("mask a bomb", {"mask": b64(bomb())}, "too_many_pixels", "mask", status=413),
    Case("mask grown too far", {"grow_mask": 257}, "invalid_value", "grow_mask", says="256"),
    Case("mask grown by a fraction", {"grow_mask": 0.5}, "invalid_value", "grow_mask"),
    Case("mask shrunk to nothing", {"grow_mask": -SIZE}, "empty_mask", "mask", says="shrunk"),
    Case("mask blurred away", {"mask": b64(dot()), "mask_blur": 256.0}, "empty_mask", "mask", says="blurred"),
    Case("mask blurred too far", {"mask_blur": 256.5}, "invalid_value", "mask_blur", says="256"),
    Case("mask blurred by less than nothing", {"mask_blur": -1}, "invalid_value", "mask_blur"),
    Case("mask mode unknown", {"mask_mode": "red"}, "invalid_value", "mask_mode"),
]
for path, cases in (("/edit", EDIT), ("/inpaint", INPAINT)):
    for case in cases:
        case.path = path
CASES = [*GENERATE, *EDIT, *INPAINT]


def good(path: str) -> dict[str, Any]:
    fields: dict[str, Any] = {"prompt": "a cat"}
    if path != "/generate":
        fields["image"] = b64(IMAGE)
    if path == "/inpaint":
        fields["mask"] = b64(MASK)
    return fields


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.path[1:]}: {case.name}")
async def test_json(app: Running, case: Case) -> None:
    fields = {name: value for name, value in good(case.path).items() if name not in case.drop} | case.fields
    answer = await app.client.post(case.path, content=json.dumps(fields), headers={"Content-Type": "application/json"})
    found = error(answer, case.status, case.code, case.param)
    assert case.says in found["message"]
    assert found["type"] == "invalid_request_error"
    assert not found["retryable"]


JSON = "application/json"


def text_part(value: bytes, *headers: bytes) -> bytes:
    """A whole form of one prompt."""
    head = b"\r\n".join((b'Content-Disposition: form-data; name="prompt"', *headers))
    return b"--b\r\n" + head + b"\r\n\r\n" + value + b"\r\n--b--\r\n"


@pytest.mark.parametrize(
    ("body", "content_type", "status", "code", "param"),
    [
        (b"", JSON, 400, "invalid_json", None),
        (b"{", JSON, 400, "invalid_json", None),
        (b'{"prompt": "a cat"} x', JSON, 400, "invalid_json", None),
        (b'{"prompt": "\xff"}', JSON, 400, "invalid_json", None),
        ('{"prompt": "a cat"}'.encode("utf-16"), JSON, 400, "invalid_json", None),
        (b"[" * 100_00, JSON, 400, "invalid_json", None),
        (b'{"prompt": "a cat", "guidance_scale": NaN}', JSON, 400, "invalid_json", None),
        (b'{"prompt": "a cat", "guidance_scale": -Infinity}', JSON, 400, "invalid_json", None),
        (b'{"prompt": "a cat", "guidance_scale": 1e999}', JSON, 422, "invalid_value", "guidance_scale"),
        (b'{"prompt": "a cat", "seed": ' + b"9" * 5000 + b"}", JSON, 400, "invalid_json", None),
        (b'["a cat"]', JSON, 422, "invalid_value", None),
        (b"null", JSON, 422, "invalid_value", None),
        (b'{"prompt": "a cat", "prompt": "a dog"}', JSON, 422, "duplicate_field", "prompt"),
        (b"{" + b",".join(b'"%d": 0' % i for i in range(65)) + b"}", JSON, 422, "too_many_fields", None),
        (b'{"prompt": "a cat", "' + b"x" * 5000 + b'": 1}', JSON, 422, "unknown_field", "x" * 100 + "..."),
        (b'{"prompt": "a cat"}', "application/json; charset=latin-1", 415, "unsupported_charset", "content-type"),
        (
            text_part(b"a cat"),
            "multipart/form-data; boundary=b; charset=undefined",
            415,
            "unsupported_charset",
            "content-type",
        ),
        (b"{}", "application/json; charset*=utf-8''x; charset*0=y", 422, "missing_field", "prompt"),
        (b"{}", "application/json; charset*" + "1" * 5000 + "=x", 422, "missing_field", "prompt"),
        (
            text_part(b"a cat"),
            "multipart/form-data; boundary=b; charset=utf-8; charset=undefined",
            415,
            "unsupported_charset",
            "content-type",
        ),
        (text_part(b"caf\xe9"), "multipart/form-data; boundary=b", 400, "invalid_multipart", None),
        (text_part(b"a cat")[:-9], "multipart/form-data; boundary=b", 400, "invalid_multipart", None),
        *(
            (text_part(b"YSBjYXQ=", header), "multipart/form-data; boundary=b", 400, "invalid_multipart", None)
            for header in (
                b"Content-Transfer-Encoding: base64",
                b"content-transfer-encoding: Quoted-Printable",
                b"Content-Type: text/plain; charset=utf-16",
                b"Content-Type: text/plain; charset=undefined",
            )
        ),
        (text_part(b"cat " * 3000), "multipart/form-data; boundary=b", 422, "prompt_too_long", "prompt"),
        (b"prompt=a+cat", "application/x-www-form-urlencoded", 415, "unsupported_media_type", "content-type"),
        (b"a cat", "text/plain", 415, "unsupported_media_type", "content-type"),
        (b"{}", "", 415, "unsupported_media_type", "content-type"),
        (b"x", "multipart/form-data", 400, "invalid_multipart", None),
        (b"x", "multipart/form-data; boundary=b", 400, "invalid_multipart", None),
        (b"--b\r\n\r\nx\r\n--b--\r\n", "multipart/form-data; boundary=b", 400, "invalid_multipart", None),
        (b" " * (MAX_BODY_BYTES + 1), JSON, 413, "body_too_large", None),
    ],
)
async def test_bodies(app: Running, body: bytes, content_type: str, status: int, code: str, param: str | None) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    error(await app.client.post("/generate", content=body, headers=headers), status, code, param)


async def test_a_file_in_a_part_without_a_filename_is_named(app: Running) -> None:
    form = {"prompt": (None, b"a cat"), "image": (None, IMAGE)}
    answer = await app.client.post("/edit", files=form)
    assert error(answer, 400, "invalid_multipart")["message"].startswith("image: ")


async def test_a_body_that_grows_too_large_on_the_way(app: Running) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b" " * 5000

    answer = await app.client.post("/generate", content=endless(), headers={"Content-Type": JSON})
    error(answer, 413, "body_too_large")


async def test_a_compressed_body(app: Running) -> None:
    headers = {"Content-Type": JSON, "Content-Encoding": "gzip"}
    answer = await app.client.post("/generate", content=b"{}", headers=headers)
    error(answer, 415, "unsupported_content_encoding")


Parts = list[tuple[str, tuple[str | None, str | bytes]]]


def parts(*extra: tuple[str, str | bytes], file: str = "") -> Parts:
    """Form parts; those named in ``file`` are file parts."""
    return [(name, ("upload.png" if name in file.split() else None, value)) for name, value in extra]


@pytest.mark.parametrize(
    ("form", "code", "param"),
    [
        (
            parts(("prompt", "a cat"), ("image", IMAGE), ("scheduler", "ddim"), file="image"),
            "unknown_field",
            "scheduler",
        ),
        (parts(("prompt", "a cat"), ("prompt", "a dog")), "duplicate_field", "prompt"),
        (parts(("prompt", b"a cat"), ("image", IMAGE), file="prompt image"), "invalid_value", "prompt"),
        (parts(("prompt", "a cat"), ("image", b64(IMAGE)[:100])), "invalid_value", "image"),
        (parts(("prompt", "a cat"), ("image", IMAGE), ("image", IMAGE), file="image"), "duplicate_field", "image"),
        (parts(("prompt", "a cat"), ("image", IMAGE), ("steps", "four"), file="image"), "invalid_value", "steps"),
        (parts(("prompt", "a cat"), ("image", IMAGE), ("steps", "3"), file="image"), "unsupported_steps", "steps"),
        (parts(("prompt", "a cat"), ("image", IMAGE), ("seed", "1_0"), file="image"), "invalid_value", "seed"),
        (
            parts(("prompt", "a cat"), ("image", IMAGE), ("guidance_scale", "nan"), file="image"),
            "invalid_value",
            "guidance_scale",
        ),
        (parts(("image", IMAGE), file="image"), "missing_field", "prompt"),
        (parts(("prompt", "a cat")), "missing_field", "image"),
    ],
)
async def test_multipart(app: Running, form: Parts, code: str, param: str) -> None:
    error(await app.client.post("/edit", files=form), 422, code, param)


async def test_an_undecodable_file_part(app: Running) -> None:
    form = parts(("prompt", "a cat"), ("image", b"hello"), file="image")
    error(await app.client.post("/edit", files=form), 400, "undecodable", "image")


async def test_fields_in_the_url(app: Running) -> None:
    error(await app.client.post("/generate?steps=4", json={"prompt": "a cat"}), 422, "unknown_field", "query")


async def test_a_form_of_answer_that_cannot_be_had(app: Running) -> None:
    headers = {"Accept": "image/png"}
    answer = await app.client.post("/generate", json={"prompt": "a cat", "n": 2}, headers=headers)
    error(answer, 406, "not_acceptable", "accept")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("POST", "/nowhere", 404, "not_found"),
        ("GET", "/playground/nothing.js", 404, "not_found"),
        ("GET", "/playground/../settings.py", 404, "not_found"),
        ("GET", "/generate", 405, "method_not_allowed"),
        ("POST", "/generate/", 404, "not_found"),
        ("DELETE", "/metrics", 405, "method_not_allowed"),
        ("GET", "/docs", 404, "not_found"),
    ],
)
async def test_routes_that_are_not_there(app: Running, method: str, path: str, status: int, code: str) -> None:
    answer = await app.client.request(method, path)
    error(answer, status, code)
    assert ("allow" in answer.headers) == (status == 405)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("OPTIONS", "/jobs/x", "GET, HEAD, DELETE"),
        ("DELETE", "/models", "GET, HEAD"),
        ("PUT", "/v1/models/tiny", "GET, HEAD"),
        ("GET", "/generate", "POST"),
    ],
)
async def test_a_refused_method_is_told_all_that_the_path_takes(
    app: Running, method: str, path: str, allowed: str
) -> None:
    answer = await app.client.request(method, path)
    error(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == allowed


async def test_a_class_bundle_wants_a_class_it_has(
    anyio_backend: str, settings: Settings, class_bundle_path: Path
) -> None:
    async with running(settings.model_copy(update={"bundle": str(class_bundle_path)})) as app:
        error(await app.post("/generate", prompt="a cat"), 422, "unsupported_option", "prompt")
        error(await app.post("/generate"), 422, "missing_field", "class")
        found = error(await app.post("/generate", **{"class": "nine"}), 422, "unknown_class", "class")
        assert "zero" in found["message"]


async def test_a_fault_of_our_own_is_a_500_in_the_one_shape_and_tells_nothing(
    app: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: object) -> None:
        raise KeyError("a secret cat")

    monkeypatch.setattr(app.pipeline, "validate", broken)
    answer: httpx.Response = await app.post("/generate", prompt="a secret cat")
    found = error(answer, 500, "internal_error")
    assert (found["type"], found["retryable"]) == ("internal_error", True)
    assert "secret" not in answer.text
    [record] = [record for record in caplog.records if record.message == "unhandled"]
    assert "secret" not in str(vars(record))
