"""Tasks: what a caller asks for, and whether a bundle can honour it. Pure data and checks; runs nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engines.manifest import Manifest, Sampler
from engines.tokenizer import PromptSize, TokenizerError

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Blend = NDArray[np.uint8]

MAX_SEED = 2**63 - 1


class TaskError(ValueError):
    """What the loaded bundle cannot honour. ``param`` is the field of the task at fault."""

    def __init__(self, code: str, param: str, message: str) -> None:
        """``code`` is for programs, ``message`` for people."""
        super().__init__(message)
        self.code = code
        self.param = param
        self.message = message


@dataclass(frozen=True, eq=False)
class Generate:
    """Make an image from noise. ``condition`` is a prompt or a class name; ``guidance`` is w (0 = none).

    ``steps`` are the network calls that the sampler takes from noise to the image.
    """

    condition: str
    steps: int
    guidance: float
    seed: int
    sampler: Sampler = field(default="deterministic", kw_only=True)


@dataclass(frozen=True, eq=False)
class Edit(Generate):
    """Make an image starting from ``image`` (H, W, 3); ``strength`` in (0, 1] is the share of steps run."""

    image: Pixels
    strength: float


@dataclass(frozen=True, eq=False)
class Inpaint(Generate):
    """Make anew the pixels of ``image`` (H, W, 3) where ``repaint`` (H, W) is True; keep the others.

    With a ``blend`` (H, W), 0 wherever ``repaint`` is False, the new pixels show by its share of 255.
    """

    image: Pixels
    repaint: Mask
    strength: float = 1.0
    blend: Blend | None = None


@dataclass(frozen=True, eq=False)
class Transfer(Generate):
    """Make an image from the noise that ``image`` (H, W, 3) encodes to under ``source``, what it shows now.

    (Style transfer, Meng et al. 2023, "Progressive distillation for encoding".) No noise is drawn, so the seed changes
    nothing.
    """

    image: Pixels
    source: str


_STRENGTHS = 10_000

FromImage = Edit | Inpaint | Transfer
Task = Generate | FromImage


def kept_steps(steps: int, strength: float) -> int:
    """Steps that run at ``strength``: int(steps * strength), as diffusers has it."""
    return min(int(steps * strength), steps)


def strengths(steps: int) -> tuple[float, ...]:
    """The lowest strength, in ten-thousandths, that keeps k of ``steps`` steps, for each k from 1."""
    return tuple(_lowest_strength(steps, kept) for kept in range(1, steps + 1))


def _lowest_strength(steps: int, kept: int) -> float:
    parts = math.ceil(_STRENGTHS * kept / steps)
    # As floats are, the product may fall short.
    return (parts if kept_steps(steps, parts / _STRENGTHS) == kept else parts + 1) / _STRENGTHS


def words_of(task: Task) -> tuple[str, ...]:
    """Every prompt, or class, that a task's image is conditioned on."""
    return (task.condition, task.source) if isinstance(task, Transfer) else (task.condition,)


def ticks(task: Task) -> int:
    """The ticks that an image takes: one for each network call."""
    if isinstance(task, Edit | Inpaint):
        return kept_steps(task.steps, task.strength)
    return 2 * task.steps if isinstance(task, Transfer) else task.steps


def check_task(task: Task, manifest: Manifest, measure: Callable[[str], PromptSize]) -> None:
    """Raise TaskError where the bundle of ``manifest`` cannot honour ``task``. Calls no engine.

    ``measure`` counts the tokens of a prompt, and may raise TokenizerError.
    """
    _check_steps(task, manifest)
    _check_guidance(task, manifest)
    _check_seed(task)
    _check_condition(task.condition, "condition", manifest, measure)
    if isinstance(task, Transfer):
        check_encoder(task.steps, manifest)
        _check_decodes_alike(task)
        _check_condition(task.source, "source", manifest, measure)
    if isinstance(task, Edit | Inpaint):
        _check_strength(task.steps, task.strength)
    if isinstance(task, FromImage):
        _check_image(task.image, manifest)
    if isinstance(task, Inpaint):
        _check_repaint(task.repaint, manifest)
        if task.blend is not None:
            _check_blend(task.blend, task.repaint)


def check_encoder(steps: int, manifest: Manifest) -> None:
    """Raise TaskError where the student of ``steps`` steps has no encoder."""
    if steps not in manifest.encoded_steps():
        listed = ", ".join(map(str, manifest.encoded_steps()))
        message = f"there is no encoder of {steps} steps, only of {listed}" if listed else "no student has an encoder"
        raise TaskError("unsupported_method", "method", message)


def _check_steps(task: Task, manifest: Manifest) -> None:
    if manifest.find_student(task.steps, task.sampler) is not None:
        return
    listed = ", ".join(map(str, manifest.trained_steps(task.sampler)))
    if task.sampler == "deterministic":
        raise TaskError("unsupported_steps", "steps", f"no student of {task.steps} steps; there are {listed}")
    message = f"no student was trained for the {task.sampler} sampler"
    if listed:
        message += f" in {task.steps} steps; there are {listed}"
    raise TaskError("unsupported_sampler", "sampler", message)


def _check_decodes_alike(task: Transfer) -> None:
    if task.sampler != "deterministic":
        message = "what was encoded is decoded without noise: use the deterministic sampler"
        raise TaskError("unsupported_sampler", "sampler", message)


def _check_guidance(task: Task, manifest: Manifest) -> None:
    low, high = manifest.guidance.minimum, manifest.guidance.maximum
    if not low <= task.guidance <= high:
        message = f"guidance w = {task.guidance:g} is outside the trained range {low:g} to {high:g}"
        raise TaskError("guidance_out_of_range", "guidance", f"{message} (guidance_scale is 1 + w)")


def _check_seed(task: Task) -> None:
    if not 0 <= task.seed <= MAX_SEED:
        raise TaskError("seed_out_of_range", "seed", f"seed must lie between 0 and {MAX_SEED}")


def _check_condition(words: str, param: str, manifest: Manifest, measure: Callable[[str], PromptSize]) -> None:
    if manifest.text is None:
        if words not in manifest.classes:
            listed = ", ".join(manifest.classes[:20]) + (", ..." if len(manifest.classes) > 20 else "")
            raise TaskError("unknown_class", param, f"no class {words!r}; there are {listed}")
        return
    try:
        size = measure(words)
    except TokenizerError as error:
        raise TaskError("invalid_prompt", param, str(error)) from error
    if not words.strip() or not size.words:
        raise TaskError("empty_prompt", param, "the prompt is empty")
    if not size.known:
        raise TaskError("unknown_words", param, "the text encoder knows none of the words of the prompt")
    if size.tokens > manifest.text.max_tokens:
        message = f"the prompt has {size.tokens} tokens with its end marks, at most {manifest.text.max_tokens} fit"
        raise TaskError("prompt_too_long", param, message)


def _check_strength(steps: int, strength: float) -> None:
    if not 0 < strength <= 1:
        raise TaskError("strength_out_of_range", "strength", f"strength {strength:g} is not in (0, 1]")
    if kept_steps(steps, strength) == 0:
        message = f"strength {strength:g} leaves no step of {steps}; use {strengths(steps)[0]:g} to 1"
        raise TaskError("strength_leaves_no_step", "strength", message)


def _check_image(image: Pixels, manifest: Manifest) -> None:
    _, height, width = manifest.image_shape
    if image.dtype != np.uint8 or image.shape != (height, width, 3):
        message = f"image is {image.dtype} {image.shape}, expected uint8 {(height, width, 3)}"
        raise TaskError("image_shape", "image", message)


def _check_repaint(repaint: Mask, manifest: Manifest) -> None:
    _, height, width = manifest.image_shape
    if repaint.dtype != np.bool_ or repaint.shape != (height, width):
        message = f"mask is {repaint.dtype} {repaint.shape}, expected bool {(height, width)}"
        raise TaskError("mask_shape", "mask", message)
    if not repaint.any():
        raise TaskError("empty_mask", "mask", "the mask marks no pixel to repaint")


def _check_blend(blend: Blend, repaint: Mask) -> None:
    if blend.dtype != np.uint8 or blend.shape != repaint.shape:
        message = f"blend is {blend.dtype} {blend.shape}, expected uint8 {repaint.shape}"
        raise TaskError("mask_shape", "mask", message)
    if blend[~repaint].any():
        raise TaskError("mask_blend", "mask", "the blend shows pixels that are not made anew")
