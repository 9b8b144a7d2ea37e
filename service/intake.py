"""Checked fields -> a job that the loaded bundle can honour, or a clear refusal. Queues nothing."""

from __future__ import annotations

import secrets
import uuid
from dataclasses import replace

from engines.images import ImageFormat, ImageLimits
from engines.manifest import Manifest
from engines.pipeline import Edit, Generate, Inpaint, Pipeline, Task, TaskError
from service.capabilities import default_steps, default_strength
from service.errors import ApiError, from_task_error
from service.jobs import Job, Output, Priority
from service.pictures import MaskEdge, read_image, read_mask, read_settings
from service.schemas import MAX_SEED, EditRequest, GenerateRequest, InpaintRequest
from service.settings import Settings

_RANDOM_SEEDS = 2**32
_REUSED = ("steps", "guidance_scale", "seed")


def make_job(
    request: GenerateRequest,
    output_format: ImageFormat,
    pipeline: Pipeline,
    settings: Settings,
    *,
    request_id: str,
    began: float,
) -> Job:
    """The job for a request that arrived at ``began``. Raises ApiError; decodes images last, as that is dear."""
    request = _with_settings(request, settings)
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


def _guidance(request: GenerateRequest, manifest: Manifest) -> float:
    """The guidance w. The pipeline checks it too, but clients speak of guidance_scale = 1 + w."""
    trained = manifest.guidance
    if request.guidance_scale is None:
        return trained.default
    low, high = 1 + trained.minimum, 1 + trained.maximum
    if not low <= request.guidance_scale <= high:
        message = f"guidance_scale must lie in the trained range, {low:g} to {high:g}"
        raise ApiError(422, "guidance_out_of_range", message, param="guidance_scale")
    # Subtracting may round to just outside.
    return min(max(request.guidance_scale - 1, trained.minimum), trained.maximum)


def _tasks(request: GenerateRequest, pipeline: Pipeline, settings: Settings) -> tuple[Task, ...]:
    manifest = pipeline.manifest
    param, condition = _condition(request, manifest, settings)
    steps = default_steps(manifest) if request.steps is None else request.steps
    first = Generate(condition, steps, _guidance(request, manifest), _first_seed(request))
    names = {"condition": param, "guidance": "guidance_scale"}
    try:
        pipeline.validate(first)
        task = _with_images(first, request, manifest, settings)
        pipeline.validate(task)
    except TaskError as error:
        raise from_task_error(error, names.get(error.param, error.param)) from error
    return tuple(replace(task, seed=task.seed + index) for index in range(request.n))


def _condition(request: GenerateRequest, manifest: Manifest, settings: Settings) -> tuple[str, str]:
    """The field that says what to show, and its value."""
    wanted, other = ("prompt", "class") if manifest.conditioning == "text" else ("class", "prompt")
    given = {"prompt": request.prompt, "class": request.class_name}
    if given[other] is not None:
        raise _unsupported(other, f"this bundle is conditioned on {wanted}")
    value = given[wanted]
    if value is None:
        raise ApiError(422, "missing_field", f"{wanted}: required", param=wanted)
    if len(value) > settings.max_prompt_chars:
        message = f"at most {settings.max_prompt_chars} characters, this has {len(value)}"
        raise ApiError(422, "prompt_too_long", message, param=wanted)
    return wanted, value


def _first_seed(request: GenerateRequest) -> int:
    if request.seed is None:
        return secrets.randbelow(_RANDOM_SEEDS)
    if request.seed + request.n - 1 > MAX_SEED:
        message = f"image i uses seed + i, which may be at most {MAX_SEED}"
        raise ApiError(422, "seed_out_of_range", message, param="seed")
    return request.seed


def _with_settings(request: GenerateRequest, settings: Settings) -> GenerateRequest:
    """The request with what it names no value for taken from its image's file, where it says ``reuse``."""
    if not isinstance(request, EditRequest) or not request.reuse:
        return request
    found = read_settings(request.image, _limits(settings))
    names = [name for name in _REUSED if getattr(request, name) is None]
    return request.model_copy(update={name: getattr(found, name) for name in names})


def _limits(settings: Settings) -> ImageLimits:
    return ImageLimits(max_bytes=settings.max_image_bytes, max_pixels=settings.max_pixels)


def _with_images(first: Generate, request: GenerateRequest, manifest: Manifest, settings: Settings) -> Task:
    if not isinstance(request, EditRequest):
        return first
    _, height, width = manifest.image_shape
    size = width, height
    limits = _limits(settings)
    image, image_size = read_image(request.image, size, limits)
    shared = (first.condition, first.steps, first.guidance, first.seed, image)
    if isinstance(request, InpaintRequest):
        edge = MaskEdge(request.grow_mask, request.mask_blur)
        repaint, blend = read_mask(request.mask, request.mask_mode, edge, image_size, size, limits)
        return Inpaint(*shared, repaint, 1.0 if request.strength is None else request.strength, blend)
    return Edit(*shared, default_strength(first.steps) if request.strength is None else request.strength)


def _unsupported(param: str, message: str) -> ApiError:
    return ApiError(422, "unsupported_option", message, param=param)
