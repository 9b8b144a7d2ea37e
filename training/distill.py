"""The order of the stages: autoencoder, teacher, stage 1, the rounds of stage 2. Each is kept, and skipped when done.

A stage that is not done is trained, from its checkpoint if there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from training.autoencoder import Reconstructor, measure_scale, reconstruction_loss
from training.data.order import BatchOrder
from training.data.training_set import load_pixels, load_training_set
from training.diffusion import Grid
from training.draws import IMAGES_STREAM, Draws, generator_at, stage_seed
from training.guidance import Condition, Denoiser, GuidedTeacher
from training.loop import save_picture, train
from training.losses import Batch, Course, output_matching_loss, progressive_loss, teacher_loss
from training.networks import NetworkDenoiser, build_autoencoder, build_unet, student_from
from training.pictures import save_grid
from training.rounds import ROWS_AT_ONCE, SHARDS, Trial, has_row, record
from training.run import Run
from training.sampler import sample
from training.sections import EncoderRecipe, Optimisation, Round, Stage2Recipe, TeacherRecipe
from training.stages import AUTOENCODER, STAGE1, TEACHER, encoder_stage, student_stage
from training.state import Validation
from training.store import hash_of_array

SAMPLE_ROWS, SAMPLE_COLUMNS = 4, 8
TEACHER_SAMPLE_STEPS = 32
SCALE_IMAGES = 2048
VALIDATION_PARTS = 16

Loaded = TypeVar("Loaded")
Loss = Callable[[nn.Module, Batch, Draws], Tensor]
Trials = Callable[[bool], Trial]
"""The trial of samplers, or with True of encoders, whose data are read when it is first asked for."""


def train_teacher(run: Run) -> bool:
    """The autoencoder, if the recipe has one, and the teacher; whether one of them was not done.

    A teacher that is there is noted as the run's.
    """
    was_left = False
    run.know_checkpoint()
    if run.recipe.autoencoder and not run.is_done(AUTOENCODER):
        train_autoencoder(run)
        was_left = True
    if not run.is_done(TEACHER):
        _train_teacher(run)
        was_left = True
    run.tidy(AUTOENCODER, TEACHER)
    return was_left


def distill(run: Run) -> bool:
    """Every stage that is not done: the teacher too. Whether there was one."""
    was_left = train_teacher(run)
    trials: Trials = cache(partial(Trial.of, run))
    if not run.is_done(STAGE1) or not has_row(run, STAGE1):
        _match_outputs(run, trials(False))
        was_left = True
    run.tidy(STAGE1)
    was_left |= _run_rounds(run, run.recipe.stage2, trials)
    if run.recipe.encoder is not None:
        was_left |= _run_rounds(run, run.recipe.encoder, trials)
    return was_left


def _run_rounds(run: Run, recipe: Stage2Recipe, trials: Trials) -> bool:
    """Every round that is not done, or has no row in the table; whether there was one."""
    encoding = isinstance(recipe, EncoderRecipe)
    name = encoder_stage if encoding else student_stage
    previous, was_left = STAGE1, False
    for round_, teacher_steps in zip(recipe.rounds, recipe.teachers_steps(), strict=True):
        stage = name(round_.steps)
        course: Course = "encoding" if encoding else "stochastic" if round_.stochastic else "deterministic"
        if not run.is_done(stage) or not has_row(run, stage):
            _run_round(run, round_, previous, teacher_steps, stage, course, trials(encoding))
            was_left = True
        run.tidy(stage)
        previous = stage
    return was_left


def train_autoencoder(run: Run) -> None:
    """The autoencoder of the recipe, on the images of its folder."""
    recipe = run.recipe.autoencoder
    assert recipe is not None
    images = load_pixels(run.recipe.data, "train")
    run.known(AUTOENCODER, hash_of_array(images.numpy()))
    with run.accelerator.main_process_first():
        fingerprint = load_training_set(run.recipe, "train", run.cache, run.prompts).fingerprint
    run.known("denoiser", fingerprint)
    torch.manual_seed(run.recipe.seed)
    network = Reconstructor(build_autoencoder(recipe, run.recipe.data.size))
    if run.recipe.scale.gradient_checkpointing:
        network.autoencoder.enable_gradient_checkpointing()
    order = BatchOrder(len(images), recipe.batch_size, run.recipe.seed)

    def load(update: int, draws: Draws) -> Tensor:
        return images[draws.of(order.at(update))].to(run.device)

    def loss(network: nn.Module, batch: Tensor, draws: Draws) -> Tensor:
        return reconstruction_loss(network, batch, recipe, draws)

    def some(draws: Draws) -> Tensor:
        return images[draws.integers(len(images))].to(run.device)

    def show(network: Reconstructor, path: Path) -> None:
        shown = images[: SAMPLE_ROWS * SAMPLE_COLUMNS // 2].to(run.device)
        with torch.inference_mode():
            save_grid(torch.cat([shown, network.autoencoder(shown, return_dict=False)[0]]), path, SAMPLE_COLUMNS)

    model: AutoencoderKL = train(
        network, loss, recipe, run.folder / AUTOENCODER, seed=run.recipe.seed, load=load, sample=show,
        validation=_validation(run, AUTOENCODER, recipe, loss, some),
        accelerator=run.accelerator, scale=run.recipe.scale, pace=run.pace,
    ).autoencoder  # fmt: skip
    measured = images[
        torch.randperm(len(images), generator=generator_at(run.recipe.seed, 0, IMAGES_STREAM))[:SCALE_IMAGES]
    ]
    model.register_to_config(scaling_factor=measure_scale(model, measured, run.device))
    run.finish(AUTOENCODER, model)


def _train_teacher(run: Run) -> None:
    data, recipe = run.data, run.recipe.teacher
    assert isinstance(recipe, TeacherRecipe)
    assert run.recipe.network is not None
    context_dim = run.null["context"].shape[-1] if run.recipe.conditioning == "text" else None
    torch.manual_seed(run.recipe.seed)
    unet = build_unet(run.recipe.network, data.shape, context_dim, len(data.classes))

    def loss(network: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        return teacher_loss(network, run.schedule, batch, run.null, recipe.drop_condition, draws, recipe.weighting)

    def guided(network: nn.Module) -> Denoiser:
        return GuidedTeacher(network, network, run.null)

    network = NetworkDenoiser(unet, run.schedule, run.prediction)
    _train_denoiser(run, TEACHER, network, loss, recipe, TEACHER_SAMPLE_STEPS, guided)


def _match_outputs(run: Run, trial: Trial) -> None:
    recipe, teacher, steps = run.recipe.stage1, run.guided_teacher(), run.recipe.stage2.start

    def loss(network: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        return output_matching_loss(
            network, teacher, run.schedule, batch, run.recipe.guidance, draws, recipe.weighting
        )  # fmt: skip

    if run.is_done(STAGE1):  # and only its row is missing
        student = run.denoiser(STAGE1)
    else:
        untrained = student_from(run.denoiser(TEACHER), run.prediction)
        student = _train_denoiser(run, STAGE1, untrained, loss, recipe, steps)
    record(run, STAGE1, trial, student, steps, trial.from_teacher(teacher, steps, steps, stochastic=False))


def _run_round(
    run: Run, recipe: Round, previous: str, teacher_steps: int, stage: str, course: Course, trial: Trial
) -> None:
    teacher = run.compiled(run.denoiser(previous))

    def loss(network: nn.Module, batch: Batch, draws: Draws) -> Tensor:
        return progressive_loss(
            network, teacher, run.schedule, batch, recipe.steps, run.recipe.guidance, draws, recipe.weighting, course,
            teacher_steps // recipe.steps,
        )  # fmt: skip

    from_teacher = trial.from_teacher(teacher, teacher_steps, recipe.steps, recipe.stochastic)
    if run.is_done(stage):  # and only its row is missing
        student = run.denoiser(stage)
    else:
        untrained = student_from(run.denoiser(previous), run.prediction)
        # An encoder makes noise, of which there is nothing to see.
        sample_steps = None if course == "encoding" else recipe.steps
        student = _train_denoiser(run, stage, untrained, loss, recipe, sample_steps, distance=from_teacher)
    record(run, stage, trial, student, recipe.steps, from_teacher)


def _train_denoiser(
    run: Run,
    stage: str,
    network: NetworkDenoiser,
    loss: Loss,
    recipe: Optimisation,
    sample_steps: int | None,
    as_sampled: Callable[[nn.Module], Denoiser] = lambda network: network,
    distance: Callable[[nn.Module], float] | None = None,
) -> NetworkDenoiser:
    data, seed = run.data, stage_seed(run.recipe.seed, stage)
    order = data.order(recipe.batch_size, seed)
    network.train().requires_grad_(True)
    if run.recipe.scale.gradient_checkpointing:
        network.network.enable_gradient_checkpointing()

    def load(update: int, draws: Draws) -> Batch:
        batch = data.batch(draws.of(order.at(update)), draws, run.device)
        data.prefetch(order.ahead(update))
        return batch

    def some(draws: Draws) -> Batch:
        return data.batch(draws.integers(len(data.excerpt(SHARDS))), draws, run.device)

    picture = Picture(run)

    def show(network: nn.Module, path: Path) -> None:
        if sample_steps is not None:
            save_grid(picture.of(as_sampled(network), run.schedule.grid(sample_steps)), path, SAMPLE_COLUMNS)

    trained = train(
        network, loss, recipe, run.folder / stage, seed=seed, load=load, sample=show,
        validation=_validation(run, stage, recipe, loss, some, distance),
        accelerator=run.accelerator, scale=run.recipe.scale, pace=run.pace,
    ).requires_grad_(False)  # fmt: skip
    if run.accelerator.is_main_process:
        save_picture(show, trained, run.folder / stage / "samples.png")
    run.finish(stage, trained)
    return trained


def _validation(
    run: Run,
    stage: str,
    recipe: Optimisation,
    loss: Callable[[nn.Module, Loaded, Draws], Tensor],
    some: Callable[[Draws], Loaded],
    distance: Callable[[nn.Module], float] | None = None,
) -> Validation | None:
    """What the recipe asks for: by `distance`, or by the loss of `some` data, which are read once."""
    if not recipe.validate_every:
        return None
    return Validation(distance or _fixed_loss(run, stage, loss, some), recipe.validate_every, recipe.patience)


def _fixed_loss(
    run: Run,
    stage: str,
    loss: Callable[[nn.Module, Loaded, Draws], Tensor],
    some: Callable[[Draws], Loaded],
) -> Callable[[nn.Module], float]:
    """Takes the loss of a stage, always of the same data, times and noise."""
    seed, rows = stage_seed(run.recipe.seed, f"{stage}, validation"), range(ROWS_AT_ONCE)
    batches = [some(Draws(seed, part, rows)) for part in range(VALIDATION_PARTS)]

    def distance(network: nn.Module) -> float:
        with torch.no_grad(), run.accelerator.autocast():
            parts = enumerate(batches, start=VALIDATION_PARTS)
            return float(torch.stack([loss(network, batch, Draws(seed, part, rows)) for part, batch in parts]).mean())

    return distance


@dataclass(frozen=True)
class Picture:
    """Images for a fixed choice of conditions, read once, each row of the picture at another w."""

    run: Run

    @cached_property
    def start(self) -> tuple[Tensor, Condition]:
        """The noise and the conditions of a row."""
        draws, data = Draws(self.run.recipe.seed, 0, range(SAMPLE_COLUMNS)), self.run.data
        items = torch.linspace(0, len(data.excerpt(1)) - 1, SAMPLE_COLUMNS).long()
        batch = data.batch(items, draws, self.run.device)
        return draws.normal(batch.x), batch.condition

    def of(self, denoiser: Denoiser, grid: Grid) -> Tensor:
        """The images, row by row."""
        noise, condition = self.start
        rows = []
        for w in torch.linspace(*self.run.recipe.guidance, SAMPLE_ROWS).tolist():
            weight = torch.full((SAMPLE_COLUMNS,), w, device=self.run.device)
            rows.append(sample(denoiser, grid, noise, condition, weight))
        return self.run.decoded(torch.cat(rows))
