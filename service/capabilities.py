"""What the loaded bundle offers, in the words of the API. Pure functions of the manifest and the settings."""

from __future__ import annotations

from collections.abc import Sequence

from engines.images import FORMATS, MASK_MODES
from engines.manifest import SAMPLERS, Manifest
from engines.masks import MAX_BLUR_PX, MAX_GROW_PX
from engines.tasks import strengths
from service.schemas import MAX_SEED, Capabilities, EditMethod, Limits, Range, Size
from service.settings import Settings

_PREFERRED_STEPS = 4
_PREFERRED_STRENGTH = 0.75
TASKS = ("generate", "edit", "inpaint")


def default_steps(offered: Sequence[int]) -> int:
    """4 where it is among the numbers of steps, else the most there are."""
    return _PREFERRED_STEPS if _PREFERRED_STEPS in offered else max(offered)


def default_strength(steps: int) -> float:
    """The strength of an edit that names none: the one nearest below 0.75, or the lowest."""
    lowest, *others = strengths(steps)
    return max([lowest, *(value for value in others if value <= _PREFERRED_STRENGTH)])


def describe(manifest: Manifest, settings: Settings) -> Capabilities:
    """The answer of /capabilities."""
    _, height, width = manifest.image_shape
    low, high, usual = manifest.guidance.scales
    samplers = {sampler: steps for sampler in SAMPLERS if (steps := manifest.trained_steps(sampler))}
    any_steps = sorted({count for steps in samplers.values() for count in steps})
    methods: dict[EditMethod, tuple[int, ...]] = {"sdedit": tuple(any_steps)}
    if encoded := manifest.encoded_steps():
        methods["encode"] = encoded
    return Capabilities(
        model=manifest.name,
        revision=manifest.revision,
        space=manifest.space,
        conditioning=manifest.conditioning,
        classes=manifest.classes,
        image=Size(width=width, height=height),
        students=samplers["deterministic"],
        samplers=samplers,
        edit_methods=methods,
        default_steps=default_steps(samplers["deterministic"]),
        guidance_scale=Range(minimum=low, maximum=high, default=usual),
        strengths={str(count): strengths(count) for count in any_steps},
        default_strength={str(count): default_strength(count) for count in any_steps},
        tasks=TASKS,
        mask_modes=MASK_MODES,
        output_formats=FORMATS,
        negative_prompt=False,
        safety=settings.safety,
        limits=Limits(
            max_body_bytes=settings.max_body_bytes,
            max_image_bytes=settings.max_image_bytes,
            max_pixels=settings.max_pixels,
            max_images=settings.max_images,
            max_prompt_chars=settings.max_prompt_chars,
            max_prompt_tokens=manifest.text.max_tokens if manifest.text else None,
            max_seed=MAX_SEED,
            max_mask_blur=MAX_BLUR_PX,
            max_grow_mask=MAX_GROW_PX,
            max_inflight=settings.max_inflight,
            max_inflight_bytes=settings.max_inflight_bytes,
            max_queue_cost=settings.max_queue_cost,
            body_timeout_ms=round(settings.body_timeout_s * 1000),
            timeout_ms=settings.timeout_ms,
            max_timeout_ms=settings.max_timeout_ms,
            job_timeout_ms=settings.job_timeout_ms,
            keep_results_ms=round(settings.keep_results_s * 1000),
            max_results=settings.max_results,
            max_result_bytes=settings.max_result_bytes,
        ),
    )
