"""The bodies of requests and answers. What needs the bundle or the settings is checked in intake.py."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from engines.images import ImageFormat, MaskMode
from engines.manifest import Sampler
from engines.masks import MAX_BLUR_PX, MAX_GROW_PX
from engines.provenance import Metadata
from service.queue.base import JobState

# JSON and JavaScript carry integers exactly up to here.
MAX_SEED = 2**53 - 1

PriorityName = Literal["low", "normal", "high"]
EditMethod = Literal["sdedit", "encode"]
Finite = Annotated[float, Field(allow_inf_nan=False)]
# Text in JSON (base64), bytes in a multipart file part; pictures.py makes bytes of both.
Picture = Annotated[
    str | bytes,
    WithJsonSchema({"type": "string", "contentEncoding": "base64", "examples": ["iVBORw0KGgo..."]}),
]


class Body(BaseModel):
    """Base of every model here: frozen; an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class Asked(Body):
    """Base of requests: an optional field that is null is as absent, and 4.0 is the integer 4, as in JSON Schema."""

    @model_validator(mode="before")
    @classmethod
    def _as_json_has_it(cls, fields: Any) -> Any:
        optional = {field.alias or name for name, field in cls.model_fields.items() if not field.is_required()}
        if not isinstance(fields, dict):
            return fields
        return {name: _whole(value) for name, value in fields.items() if value is not None or name not in optional}


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


class GenerateRequest(Asked):
    """Make images from text (or from a class, where the bundle is class-conditional).

    An optional field that is null is as absent.
    """

    prompt: Annotated[
        str | None, Field(description="What to show. Text bundles need it.", examples=["a red apple"])
    ] = None
    class_name: Annotated[
        str | None, Field(alias="class", description="What to show, one of the classes of a class bundle.")
    ] = None
    negative_prompt: Annotated[
        str | None,
        Field(description="Refused unless empty: the students know no negative prompt.", examples=[""]),
    ] = None
    model: Annotated[
        str | None,
        Field(
            description="Name of a bundle in /models, or name@revision; the default one when absent.",
            examples=["emoji"],
        ),
    ] = None
    width: Annotated[int | None, Field(description="The bundle's width in pixels, or absent.")] = None
    height: Annotated[int | None, Field(description="The bundle's height in pixels, or absent.")] = None
    steps: Annotated[
        int | None,
        Field(description="A number of steps that a student has; 4 where there is one.", examples=[4]),
    ] = None
    sampler: Annotated[
        Sampler | None,
        Field(
            description="deterministic when absent; stochastic adds noise between the steps, in the numbers of steps "
            "that /capabilities has for it."
        ),
    ] = None
    guidance_scale: Annotated[
        Finite | None,
        Field(description="1 is no guidance; the range is in /capabilities.", examples=[3.0]),
    ] = None
    seed: Annotated[
        int | None,
        Field(ge=0, le=MAX_SEED, description="Image i uses seed + i. Random when absent.", examples=[7]),
    ] = None
    n: Annotated[int, Field(ge=1, description="How many images.")] = 1
    output_format: Annotated[ImageFormat | None, Field(description="png unless the Accept header names another.")] = (
        None
    )
    quality: Annotated[int | None, Field(ge=1, le=100, description="Of jpeg and webp; png has none.")] = None
    response_format: Annotated[
        Literal["b64_json"] | None,
        Field(description="JSON with base64 images; for one image as raw bytes send Accept: image/*."),
    ] = None
    priority: Annotated[
        PriorityName,
        Field(description="Others go before low and after high, but none waits for ever."),
    ] = "normal"
    metadata: Annotated[
        Metadata,
        Field(
            description="What each file says of how it was made: settings, full (with the prompt or class), or none."
        ),
    ] = "settings"
    timeout_ms: Annotated[
        int | None, Field(ge=1, description="Time limit from the arrival of the request; then 504.")
    ] = None
    asynchronous: Annotated[
        bool,
        Field(alias="async", description="Answer at once with 202 and a job, like the header Prefer: respond-async."),
    ] = False


class ImageRequest(GenerateRequest):
    """Make images that start from an image. An image of another size is resized to the bundle's."""

    image: Annotated[Picture, Field(description="PNG, JPEG or WebP: base64 or data URI, or a file part.")]
    strength: Annotated[
        Finite | None,
        Field(gt=0, le=1, description="Share of the steps that run; low keeps more of the image."),
    ] = None
    reuse: Annotated[
        bool,
        Field(
            description="Take steps, guidance_scale, sampler, seed, strength, an edit's method, and the prompt or "
            "class, for encode that of the source too, where they are absent, from what the image's file says of how "
            "it was made (see metadata; prompts are in files of `full` only). Never the model. Refused where it says "
            "nothing."
        ),
    ] = False


class EditRequest(ImageRequest):
    """Make images that start from an image: from the image with noise added, or from the noise that it encodes to.

    ``encode`` draws no noise: it takes no strength and no seed, and makes one image. It needs to know what the image
    shows now, in ``source_prompt`` or ``source_class``.
    """

    method: Annotated[
        EditMethod | None,
        Field(
            description="sdedit when absent; encode is for style transfer, in the numbers of steps that /capabilities "
            "has for it."
        ),
    ] = None
    source_prompt: Annotated[
        str | None, Field(description="For encode: what the image shows.", examples=["a red apple"])
    ] = None
    source_class: Annotated[
        str | None, Field(description="For encode: the class of what the image shows, in a class bundle.")
    ] = None


class InpaintRequest(ImageRequest):
    """Make part of an image anew.

    Pixels outside the mask come back exactly as they went in (in png and where the image has the bundle's
    size; an image of another size is resized first, and its resized pixels come back exactly). A blurred mask reaches
    farther than it was drawn: what lies more than 3 x mask_blur + 3 pixels outside comes back exactly.
    """

    mask: Annotated[Picture, Field(description="Marks what to repaint; of the image's own size.")]
    mask_mode: Annotated[
        MaskMode,
        Field(description="What is repainted: white pixels, black pixels, or where alpha is 0."),
    ] = "white"
    grow_mask: Annotated[
        int,
        Field(
            ge=-MAX_GROW_PX,
            le=MAX_GROW_PX,
            description="Pixels of the image by which the mask grows on every side; negative shrinks it.",
        ),
    ] = 0
    mask_blur: Annotated[
        Finite,
        Field(
            ge=0,
            le=MAX_BLUR_PX,
            description="Standard deviation, in pixels of the image, of a Gaussian that softens the mask's edge, after "
            "it was grown: there the old and the new image are mixed by its value. Where it is 0 the image is kept.",
        ),
    ] = 0.0


class Image(Body):
    """One image made, with the seed that makes it again."""

    b64_json: str
    seed: int
    width: int
    height: int


class TimingsMs(Body):
    """Milliseconds in each stage; ``total_ms`` is from the arrival of the request to its answer.

    In a job that nobody waited for it is the sum of the stages.
    """

    queue_ms: float
    encode_ms: float
    denoise_ms: float
    decode_ms: float
    total_ms: float


class Batch(Body):
    """The company the images had."""

    ticks: Annotated[tuple[int, ...], Field(description="Rows in each tick that moved these images.")]


class ImagesResponse(Body):
    """The images in order, with seeds and timings."""

    id: str
    created: Annotated[int, Field(description="Unix time in seconds.")]
    model: str
    revision: str
    images: tuple[Image, ...]
    timings: TimingsMs
    batch: Batch


class ErrorBody(Body):
    """What went wrong."""

    type: Annotated[str, Field(examples=["invalid_request_error"])]
    code: Annotated[str, Field(examples=["unsupported_steps"])]
    message: Annotated[str, Field(examples=["no student of 3 steps; there are 1, 2, 4"])]
    param: Annotated[str | None, Field(examples=["steps"])]
    request_id: Annotated[str | None, Field(examples=["5f0c5a2e"])]
    retryable: bool


class Progress(Body):
    """The steps that have run, of those of all images together."""

    done: int
    total: int


class JobResponse(Body):
    """How far a job is. It has a ``result`` when it is done, an ``error`` when it failed or was cancelled."""

    id: str
    status: JobState
    created: Annotated[int, Field(description="Unix time in seconds, of its acceptance.")]
    model: str
    revision: str
    progress: Progress
    position: Annotated[
        int | None,
        Field(
            description="Jobs of this model that wait before it; null where it does not wait, far behind, and in a 202."
        ),
    ]
    preview: Annotated[
        str | None,
        Field(description="In events with `preview=true`: the first image in the making, a small WebP, base64."),
    ]
    result: ImagesResponse | None
    error: ErrorBody | None


class ErrorResponse(Body):
    """The shape of every error answer."""

    error: ErrorBody


class Size(Body):
    """Pixels."""

    width: int
    height: int


class Range(Body):
    """A range and its default."""

    minimum: float
    maximum: float
    default: float


class Limits(Body):
    """The bounds on a request."""

    max_body_bytes: int
    max_image_bytes: int
    max_pixels: int
    max_images: int
    max_prompt_chars: int
    max_prompt_tokens: int | None
    max_seed: int
    max_mask_blur: int
    max_grow_mask: int
    max_inflight: Annotated[int, Field(description="Requests for images at once, of all clients.")]
    max_inflight_bytes: Annotated[int, Field(description="Of their bodies together.")]
    max_queue_cost: Annotated[
        int,
        Field(description="Images x steps that may wait; newcomers fill half (priority low: a quarter, high: all)."),
    ]
    body_timeout_ms: int
    timeout_ms: int
    max_timeout_ms: int
    job_timeout_ms: Annotated[
        int, Field(description="Time limit of asynchronous jobs, and the longest they may ask for.")
    ]
    keep_results_ms: Annotated[int, Field(description="For how long the results of jobs are kept.")]
    max_results: Annotated[int, Field(description="Of all clients, kept at once; the oldest go first.")]
    max_result_bytes: Annotated[int, Field(description="Of their images together.")]


class Capabilities(Body):
    """What the loaded bundle can do, and the bounds of the service."""

    model: str
    revision: str
    space: Literal["pixel", "latent"]
    conditioning: Literal["text", "class"]
    classes: tuple[str, ...]
    image: Size
    students: Annotated[tuple[int, ...], Field(description="The numbers of steps there are.")]
    samplers: Annotated[
        dict[Sampler, tuple[int, ...]], Field(description="Those there are, and the numbers of steps each can take.")
    ]
    edit_methods: Annotated[dict[EditMethod, tuple[int, ...]], Field(description="The same of the methods of /edit.")]
    default_steps: int
    guidance_scale: Range
    strengths: Annotated[
        dict[str, tuple[float, ...]],
        Field(description="By steps: the strengths that differ. One in between acts as the next lower."),
    ]
    default_strength: Annotated[dict[str, float], Field(description="Of /edit, by steps.")]
    tasks: tuple[str, ...]
    mask_modes: tuple[str, ...]
    output_formats: tuple[str, ...]
    negative_prompt: bool
    safety: Annotated[
        str | None, Field(description="The operator's check of prompts and images; null: nothing is checked.")
    ]
    limits: Limits


class Model(Body):
    """A bundle, and whether it is in memory."""

    name: str
    revision: str
    default: Annotated[bool, Field(description="Whether requests that name no model get this one.")]
    loaded: Annotated[bool, Field(description="False: a request that names it waits until it is loaded.")]
    in_use: Annotated[int, Field(description="Requests and jobs that hold it now.")]
    memory_bytes: Annotated[int, Field(description="What its weights take when loaded, reckoned in fp32.")]
    stand_ins: Annotated[
        dict[str, Literal["building", "failed"]],
        Field(
            description="Graphs that another engine runs than the service was started with: until theirs is built, "
            "or for good where it could not be. The log says why."
        ),
    ]


class ModelList(Body):
    """The bundles of a service. One that is loaded in an older revision too is listed twice."""

    models: tuple[Model, ...]
    memory_bytes: Annotated[int, Field(description="Of those that are loaded, together.")]
    max_memory_bytes: Annotated[int | None, Field(description="The bound of that; null where workers hold them.")]


class Health(Body):
    """Whether the service lives, and whether it is ready."""

    status: Literal["ok", "loading", "ready", "queue_unavailable", "draining", "failed", "stopped"]
