"""The speed of both stages: updates of the training loop itself, with the losses of the stages, one after another."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import click
from accelerate import Accelerator
from torch import Tensor, nn

from training.draws import Draws
from training.guidance import Condition, GuidedTeacher
from training.loop import train
from training.losses import Batch, output_matching_loss, progressive_loss
from training.networks import NetworkDenoiser, student_from
from training.progress import Pace
from training.sections import Optimisation, ScaleRecipe

WARMUP = 2
STUDENT_STEPS = 4
W_RANGE = (0.0, 14.0)

Loss = Callable[[nn.Module, Batch, Draws], Tensor]
Batches = Callable[[int, Draws], Batch]


def frozen_student(teacher: NetworkDenoiser) -> NetworkDenoiser:
    """A student as stage 1 leaves it, but for what it learned."""
    return student_from(teacher).eval().requires_grad_(False)


def stage1_loss(teacher: NetworkDenoiser, null: Condition) -> Loss:
    """Output matching: a student forward and back, and two calls of the teacher."""
    guided = GuidedTeacher(teacher, teacher, null)

    def loss(student: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        return output_matching_loss(student, guided, teacher.schedule, batch, W_RANGE, draws)

    return loss


def stage2_loss(previous: NetworkDenoiser) -> Loss:
    """A round of progressive distillation: a student forward and back, and two calls of the student before it."""

    def loss(student: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        return progressive_loss(student, previous, previous.schedule, batch, STUDENT_STEPS, W_RANGE, draws)

    return loss


def time_updates(
    student: NetworkDenoiser,
    loss: Loss,
    batches: Batches,
    batch_size: int,
    updates: int,
    folder: Path,
    accelerator: Accelerator,
    scale: ScaleRecipe = ScaleRecipe(),
) -> list[float]:
    """Seconds of each of `updates` updates of the student, after the first ones, which are not counted.

    AdamW as the LCM example has it. Raises ClickException where the loop skipped one, which then took less.
    """
    recipe = Optimisation(updates=WARMUP + updates, batch_size=batch_size, learning_rate=1e-6, weight_decay=0.01)
    student.train().requires_grad_(True)
    if scale.gradient_checkpointing:
        student.network.enable_gradient_checkpointing()

    pace = Pace(log_every=1, checkpoint_every_s=math.inf)
    train(student, loss, recipe, folder, accelerator=accelerator, seed=0, load=batches, scale=scale, pace=pace)
    return seconds_of(folder / "log.jsonl")[WARMUP:]


def seconds_of(log: Path) -> list[float]:
    """Seconds of each update of a log with a line for each. Raises ClickException where one was skipped."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    if lines[-1]["skipped"]:
        raise click.ClickException(f"{log}: {lines[-1]['skipped']} updates were skipped")
    rows = lines[0]["images"] / lines[0]["update"]
    return [rows / line["images_per_s"] for line in lines]
