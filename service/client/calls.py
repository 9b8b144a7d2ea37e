"""The calls that there are: what each sends, and how its answer is read. Sends nothing."""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Generic, TypedDict
from urllib.parse import quote, urlencode

from engines.images import ImageFormat, MaskMode
from engines.manifest import Sampler
from engines.provenance import Metadata
from service.client.answers import Answer, Images, Job, Result, read_images, read_job, read_model
from service.client.pictures import Picture, file_bytes
from service.schemas import Capabilities, EditMethod, Model, ModelList, PriorityName


class GenerateOptions(TypedDict, total=False):
    """The options of `generate`, as /openapi.json has them; ``class_name`` is its ``class``."""

    class_name: str
    negative_prompt: str
    model: str
    width: int
    height: int
    steps: int
    guidance_scale: float
    sampler: Sampler
    seed: int
    n: int
    output_format: ImageFormat
    quality: int
    metadata: Metadata
    priority: PriorityName
    timeout_ms: int


class ImageOptions(GenerateOptions, total=False):
    """The options that `edit` and `inpaint` share."""

    strength: float
    reuse: bool


class EditOptions(ImageOptions, total=False):
    """The options of `edit`."""

    method: EditMethod
    source_prompt: str
    source_class: str


class InpaintOptions(ImageOptions, total=False):
    """The options of `inpaint`."""

    mask_mode: MaskMode
    grow_mask: int
    mask_blur: float


@dataclass(frozen=True)
class Call(Generic[Result]):
    """One request, and what reads its answer. It may be sent again: what it does twice is as when done once.

    Where it would not be so by itself, all its tries share an idempotency ``key``.
    """

    method: str
    path: str
    read: Callable[[Answer], Result]
    content: bytes | None = None
    key: str | None = None
    respond_async: bool = False


def generate(prompt: str | None, options: Mapping[str, Any]) -> Call[Images]:
    """POST /generate."""
    return _images("/generate", options, prompt=prompt)


def edit(image: Picture, prompt: str | None, options: Mapping[str, Any]) -> Call[Images]:
    """POST /edit."""
    return _images("/edit", options, prompt=prompt, image=_base64(image))


def inpaint(image: Picture, mask: Picture, prompt: str | None, options: Mapping[str, Any]) -> Call[Images]:
    """POST /inpaint."""
    return _images("/inpaint", options, prompt=prompt, image=_base64(image), mask=_base64(mask))


def submitted(call: Call[Images]) -> Call[Job]:
    """The same call, answered by a job at once."""
    return Call(call.method, call.path, read_job, call.content, call.key, respond_async=True)


def job(job_id: str) -> Call[Job]:
    """GET /jobs/{job_id}."""
    return Call("GET", f"/jobs/{quote(job_id, safe='')}", read_job)


def cancel(job_id: str) -> Call[Job]:
    """DELETE /jobs/{job_id}."""
    return Call("DELETE", f"/jobs/{quote(job_id, safe='')}", read_job)


def models() -> Call[ModelList]:
    """GET /models."""
    return Call("GET", "/models", read_model(ModelList))


def load(name: str) -> Call[Model]:
    """POST /models/{name}/load."""
    return Call("POST", f"/models/{quote(name, safe='@')}/load", read_model(Model))


def unload(name: str) -> Call[Model]:
    """POST /models/{name}/unload."""
    return Call("POST", f"/models/{quote(name, safe='@')}/unload", read_model(Model))


def capabilities(model: str | None) -> Call[Capabilities]:
    """GET /capabilities."""
    query = "" if model is None else "?" + urlencode({"model": model})
    return Call("GET", f"/capabilities{query}", read_model(Capabilities))


def _images(path: str, options: Mapping[str, Any], **fields: Any) -> Call[Images]:
    renamed = {("class" if name == "class_name" else name): value for name, value in options.items()}
    given = {name: value for name, value in (fields | renamed).items() if value is not None}
    return Call(
        "POST", path, read_images, json.dumps(given, allow_nan=False, default=_number).encode(), key=uuid.uuid4().hex
    )


def _number(value: object) -> int | float:
    """A number of another library, as NumPy's. Raises ValueError for what is none."""
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise ValueError(f"{value!r} cannot be sent")


def _base64(picture: Picture) -> str:
    return base64.b64encode(file_bytes(picture)).decode()
