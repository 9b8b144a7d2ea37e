"""Checked fields -> a job that the loaded bundle can honour, or a clear refusal. Queues nothing."""

from __future__ import annotations

import secrets
import uuid
from dataclasses import replace
from typing import Any

import numpy as np

from engines.images import ImageFormat, ImageLimits
from engines.manifest import SAMPLERS, Manifest
from engines.pipeline import Edit, Generate, Inpaint, Pipeline, Task, TaskError, Transfer
from engines.tasks import check_encoder
from service.capabilities import default_steps, default_strength
from service.errors import ApiError, from_task_error
from service.jobs import Job, Output, Priority
from service.pictures import MaskEdge, read_image, read_mask, read_settings
from service.schemas import MAX_SEED, EditRequest, GenerateRequest, ImageRequest, InpaintRequest
from service.settings import Settings

_RANDOM_SEEDS = 2**32
_REUSED = ("steps", "guidance_scale", "sampler", "seed", "strength")
_REUSED_TO_ENCODE = ("steps", "guidance_scale")
_SOURCES = {"prompt": "source_prompt", "class": "source_class"}


def draft_job(
    request: GenerateRequest,
    output_format: ImageFormat,
    pipeline: Pipeline,
    settings: Settings,
    *,
    request_id: str,
    began: float,
) -> Job:
    """The job for a request that arrived at ``began``, all but its images, in the place of which it has blank ones.

    Raises ApiError.
    """
    request = _with_settings(request, pipeline.manifest, settings)
    _check_options(request, output_format, pipeline.manifest, settings)
    tasks = _tasks(request, pipeline, settings)
    return Job(
        id=uuid.uuid4().hex,
        request_id=request_id,
        tasks=tasks,
        output=Output(output_format, request.quality, request.metadata),
        submitted=began,
        deadline=deadline_of(request, settings, began),
        model=pipeline.manifest.model,
        priority=Priority[request.priority.upper()],
    )


def with_images(draft: Job, request: ImageRequest, manifest: Manifest, settings: Settings) -> Job:
    """The draft with the images of its request, which are decoded here. Raises ApiError."""
    _, height, width = manifest.image_shape
    size = width, height
    limits = _limits(settings)
    image, image_size = read_image(request.image, size, limits)
    found: dict[str, Any] = {"image": image}
    if isinstance(request, InpaintRequest):
        edge = MaskEdge(request.grow_mask, request.mask_blur)
        repaint, blend = read_mask(request.mask, request.mask_mode, edge, image_size, size, limits)
        found |= {"repaint": repaint, "blend": blend}
    return replace(draft, tasks=tuple(replace(task, **found) for task in draft.tasks))


def deadline_of(request: GenerateRequest, settings: Settings, began: float) -> float:
    """When the time limit of a request that arrived at ``began`` passes, on the same clock."""
    default_ms, longest_ms = settings.timeout_ms, settings.max_timeout_ms
    if request.asynchronous:
        default_ms = longest_ms = settings.job_timeout_ms
    timeout_ms = default_ms if request.timeout_ms is None else request.timeout_ms
    return began + min(timeout_ms, longest_ms) / 1000


def _check_options(
    request: GenerateRequest, output_format: ImageFormat, manifest: Manifest, settings: Settings
) -> None:
    if request.negative_prompt:
        raise _unsupported("negative_prompt", "the students of this bundle know no negative prompt")
    _, height, width = manifest.image_shape
    for param, asked, there in (("width", request.width, width), ("height", request.height, height)):
        if asked not in (None, there):
            raise _unsupported(param, f"this bundle makes images of {width} x {height} pixels")
    if request.quality is not None and output_format == "png":
        raise _unsupported("quality", "png is lossless and has no quality; ask for jpeg or webp")
    if request.n > settings.max_images:
        raise ApiError(422, "too_many_images", f"at most {settings.max_images} images a request", param="n")
    longest_ms = settings.job_timeout_ms if request.asynchronous else settings.max_timeout_ms
    if request.timeout_ms is not None and request.timeout_ms > longest_ms:
        message = f"timeout_ms may be at most {longest_ms}"
        raise ApiError(422, "invalid_value", message, param="timeout_ms")
    if isinstance(request, EditRequest):
        _check_method(request)


def _check_method(request: EditRequest) -> None:
    """Refuse the options that the other method of an edit has."""
    if not _encodes(request):
        for param in _SOURCES.values():
            if getattr(request, param) is not None:
                raise _unsupported(param, "only the method encode asks what the image shows")
        return
    for param in ("strength", "seed"):
        if getattr(request, param) is not None:
            raise _unsupported(param, f"the method encode draws no noise: it takes no {param}")
    if request.n > 1:
        raise _unsupported("n", "the method encode draws no noise: all images would be the same")


def _guidance(request: GenerateRequest, manifest: Manifest) -> float:
    """The guidance w. The pipeline checks it too, but clients speak of guidance_scale = 1 + w."""
    trained = manifest.guidance
    if request.guidance_scale is None:
        return trained.default
    w = trained.w_of(request.guidance_scale)
    if not trained.minimum <= w <= trained.maximum:
        low, high, _ = trained.scales
        message = f"guidance_scale must lie in the trained range, {low:g} to {high:g}"
        raise ApiError(422, "guidance_out_of_range", message, param="guidance_scale")
    return w


def _tasks(request: GenerateRequest, pipeline: Pipeline, settings: Settings) -> tuple[Task, ...]:
    manifest = pipeline.manifest
    given = {"prompt": request.prompt, "class": request.class_name}
    param, condition = _condition(given, manifest, settings)
    first = Generate(
        condition,
        _steps(request, manifest),
        _guidance(request, manifest),
        _first_seed(request),
        sampler=request.sampler or SAMPLERS[0],
    )
    names = {"condition": param, "source": _SOURCES[param], "guidance": "guidance_scale"}
    try:
        pipeline.validate(first)
        if _encodes(request):
            check_encoder(first.steps, manifest)
        task = _on_a_blank(first, request, manifest, settings)
        if task is not first:
            pipeline.validate(task)
    except TaskError as error:
        raise from_task_error(error, names.get(error.param, error.param)) from error
    return tuple(replace(task, seed=task.seed + index) for index in range(request.n))


def _steps(request: GenerateRequest, manifest: Manifest) -> int:
    if request.steps is not None:
        return request.steps
    offered = manifest.encoded_steps() if _encodes(request) else manifest.trained_steps(request.sampler or SAMPLERS[0])
    # Where nothing is offered, the refusal names one that there is.
    return default_steps(offered or manifest.trained_steps())


def _encodes(request: GenerateRequest) -> bool:
    return isinstance(request, EditRequest) and request.method == "encode"


def _condition(given: dict[str, str | None], manifest: Manifest, settings: Settings) -> tuple[str, str]:
    """The field that says what an image shows, of those for a prompt and a class, and its value."""
    by_text = manifest.conditioning == "text"
    wanted, other = given if by_text else reversed(given)
    if given[other] is not None:
        raise _unsupported(other, f"this bundle is conditioned on {'prompts' if by_text else 'classes'}")
    value = given[wanted]
    if value is None:
        raise ApiError(422, "missing_field", f"{wanted}: required", param=wanted)
    if len(value) > settings.max_prompt_chars:
        message = f"at most {settings.max_prompt_chars} characters, this has {len(value)}"
        raise ApiError(422, "prompt_too_long", message, param=wanted)
    return wanted, value


def _first_seed(request: GenerateRequest) -> int:
    if _encodes(request):
        return 0
    if request.seed is None:
        return secrets.randbelow(_RANDOM_SEEDS)
    if request.seed + request.n - 1 > MAX_SEED:
        message = f"image i uses seed + i, which may be at most {MAX_SEED}"
        raise ApiError(422, "seed_out_of_range", message, param="seed")
    return request.seed


def _with_settings(request: GenerateRequest, manifest: Manifest, settings: Settings) -> GenerateRequest:
    """The request with what it names no value for taken from its image's file, where it says ``reuse``."""
    if not isinstance(request, ImageRequest) or not request.reuse:
        return request
    found = read_settings(request.image, _limits(settings))
    by_text = manifest.conditioning == "text"
    if isinstance(request, EditRequest) and request.method is None:
        request = request.model_copy(update={"method": found.method})
    reused = _REUSED_TO_ENCODE if _encodes(request) else _REUSED
    taken = {name: getattr(found, name) for name in reused if getattr(request, name) is None}
    if found.method == "encode":
        taken.pop("seed", None)  # No seed made it.
    if request.prompt is None and request.class_name is None:
        taken["prompt" if by_text else "class_name"] = found.prompt
    if not isinstance(request, EditRequest) or not _encodes(request):
        return request.model_copy(update=taken)
    if request.source_prompt is None and request.source_class is None:
        taken["source_prompt" if by_text else "source_class"] = found.source_prompt
    return request.model_copy(update=taken)


def _limits(settings: Settings) -> ImageLimits:
    return ImageLimits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_pixels)


def _on_a_blank(first: Generate, request: GenerateRequest, manifest: Manifest, settings: Settings) -> Task:
    """The task, on an image and a mask that stand for those of the request: all but these can be checked."""
    if not isinstance(request, ImageRequest):
        return first
    _, height, width = manifest.image_shape
    shared = (first.condition, first.steps, first.guidance, first.seed, np.zeros((height, width, 3), np.uint8))
    if isinstance(request, InpaintRequest):
        strength = 1.0 if request.strength is None else request.strength
        return Inpaint(*shared, np.ones((height, width), np.bool_), strength, sampler=first.sampler)
    if isinstance(request, EditRequest) and request.method == "encode":
        given = {"source_prompt": request.source_prompt, "source_class": request.source_class}
        _, source = _condition(given, manifest, settings)
        return Transfer(*shared, source, sampler=first.sampler)
    strength = default_strength(first.steps) if request.strength is None else request.strength
    return Edit(*shared, strength, sampler=first.sampler)


def _unsupported(param: str, message: str) -> ApiError:
    return ApiError(422, "unsupported_option", message, param=param)
