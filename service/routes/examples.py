"""One example of each answer, for the OpenAPI document; made of the models themselves, so that none can be wrong."""

from __future__ import annotations

from service.openai import ImageData, ImagesAnswer, ModelCard, ModelCards
from service.schemas import (
    Batch,
    Capabilities,
    Health,
    Image,
    ImagesResponse,
    JobResponse,
    Limits,
    Model,
    ModelList,
    Progress,
    Range,
    Size,
    TimingsMs,
)

# One white pixel: an image, and as a mask all of it.
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mP4DwABAQEAHLCMmQAAAABJRU5ErkJggg=="
REQUEST_ID = "5f0c5a2e9b6c4d0f8a6f3c1d2e4b7a90"

_JOB_ID = "0b9f6d1c4e7a4c55a1f2d3e4b5c6a798"
_CREATED = 1767225600
_NAME = "emoji"
_REVISION = "99351326c3b1"

IMAGES = ImagesResponse(
    id=_JOB_ID,
    created=_CREATED,
    model=_NAME,
    revision=_REVISION,
    images=(Image(b64_json=PNG, seed=7, width=32, height=32),),
    timings=TimingsMs(queue_ms=0.4, encode_ms=2.1, denoise_ms=61.8, decode_ms=5.2, total_ms=70.9),
    batch=Batch(ticks=(1, 1, 2, 2)),
)
ACCEPTED = JobResponse(
    id=_JOB_ID,
    status="queued",
    created=_CREATED,
    model=_NAME,
    revision=_REVISION,
    progress=Progress(done=0, total=4),
    position=None,
    preview=None,
    result=None,
    error=None,
)
DONE = ACCEPTED.model_copy(update={"status": "done", "progress": Progress(done=4, total=4), "result": IMAGES})

MODEL = Model(
    name=_NAME, revision=_REVISION, default=True, loaded=True, in_use=0, memory_bytes=211_000_000, stand_ins={}
)
UNLOADED = MODEL.model_copy(update={"loaded": False})
MODELS = ModelList(models=(MODEL,), memory_bytes=MODEL.memory_bytes, max_memory_bytes=8_589_934_592)

CAPABILITIES = Capabilities(
    model=_NAME,
    revision=_REVISION,
    space="latent",
    conditioning="text",
    classes=(),
    image=Size(width=32, height=32),
    students=(1, 2, 4),
    samplers={"deterministic": (1, 2, 4)},
    edit_methods={"sdedit": (1, 2, 4)},
    default_steps=4,
    guidance_scale=Range(minimum=1, maximum=5, default=3),
    strengths={"1": (1.0,), "2": (0.5, 1.0), "4": (0.25, 0.5, 0.75, 1.0)},
    default_strength={"1": 1.0, "2": 0.5, "4": 0.75},
    tasks=("generate", "edit", "inpaint"),
    mask_modes=("white", "black", "alpha"),
    output_formats=("png", "jpeg", "webp"),
    negative_prompt=False,
    safety=None,
    limits=Limits(
        max_body_bytes=12_582_912,
        max_image_bytes=8_388_608,
        max_pixels=12_582_912,
        max_images=8,
        max_prompt_chars=1000,
        max_prompt_tokens=32,
        max_seed=9_007_199_254_740_991,
        max_mask_blur=256,
        max_grow_mask=256,
        max_inflight=3072,
        max_inflight_bytes=67_108_864,
        max_queue_cost=3072,
        body_timeout_ms=30_000,
        timeout_ms=30_000,
        max_timeout_ms=120_000,
        job_timeout_ms=600_000,
        keep_results_ms=600_000,
        max_results=1024,
        max_result_bytes=268_435_456,
    ),
)
ALIVE = Health(status="ok")
READY = Health(status="ready")
LOADING = Health(status="loading")

OPENAI_IMAGES = ImagesAnswer(
    created=_CREATED, data=(ImageData(b64_json=PNG, seed=7),), output_format="png", size="32x32"
)
OPENAI_MODEL = ModelCard(id=_NAME, created=_CREATED, owned_by="fewstep")
OPENAI_MODELS = ModelCards(data=(OPENAI_MODEL,))
