"""The order of the stages: autoencoder, teacher, stage 1, the halvings of stage 2. Each is kept, and skipped when done.

A run is a folder. Every stage has a subfolder with its log, its samples and, when it is finished, its network in
diffusers' format; a stage without one is trained, from its checkpoint if there is one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Generator, Tensor, nn

from training import networks
from training.autoencoder import measure_scale, reconstruction_loss
from training.data.training_set import TrainingSet, load_pixels, load_training_set
from training.diffusion import Schedule
from training.guidance import Condition, Denoiser, GuidedTeacher
from training.loop import CHECKPOINT, BatchOrder, Pace, TrainingError, generator_at, train
from training.losses import output_matching_loss, progressive_loss, teacher_loss
from training.networks import UNetDenoiser, build_autoencoder, build_unet, student_from
from training.pictures import save_grid
from training.recipe import TIMESTEPS, Optimisation, Recipe, Round
from training.sampler import sample
from training.store import hash_of_array, whole_file
from training.text import encode_captions

RECORD = "recipe.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
SAMPLE_ROWS, SAMPLE_COLUMNS = 4, 8
TEACHER_SAMPLE_STEPS = 32
SCALE_IMAGES = 2048


@dataclass(frozen=True)
class Run:
    """A recipe at work in a folder."""

    recipe: Recipe
    folder: Path
    accelerator: Accelerator
    pace: Pace = Pace()

    def __post_init__(self) -> None:
        """Claim the folder for the recipe. Raises TrainingError if another recipe has it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        ours = json.loads(self.recipe.portable_json())
        theirs = self._recorded(RECORD, ours)
        # What is exported, and under which words, does not touch what was trained.
        if changed := sorted(key for key in ours.keys() - {"export"} if ours[key] != theirs.get(key)):
            raise TrainingError(
                f"{self.folder} was made with another recipe (it differs in: {', '.join(changed)}); "
                "choose another folder, or edit its recipe.json if you mean to go on"
            )

    def _recorded(self, name: str, ours: dict[str, Any]) -> dict[str, Any]:
        """What a record of the run says; at first, what we write into it. Raises TrainingError for a broken one."""
        if not (record := self.folder / name).exists():
            with whole_file(record) as partial:
                partial.write_text(json.dumps(ours, indent=1))
        try:
            theirs: dict[str, Any] = json.loads(record.read_text())
        except ValueError as error:
            raise TrainingError(f"{record} is not JSON: {error}") from error
        return theirs

    def known(self, use: str, fingerprint: str) -> None:
        """Note the data that the run uses. Raises TrainingError if it is not what it was, so that no run mixes two."""
        if self._recorded(f"data-{use}.json", {"sha256": fingerprint})["sha256"] != fingerprint:
            raise TrainingError(
                f"{self.folder} was begun with other images, captions or classes than those that are there now; "
                f"bring those back, choose another folder, or remove its data-{use}.json if you mean to go on"
            )

    @cached_property
    def schedule(self) -> Schedule:
        """The cosine schedule that every stage shares."""
        return Schedule.cosine(TIMESTEPS)

    @property
    def cache(self) -> Path:
        """Where encoded captions are kept."""
        return self.folder / "cache"

    @cached_property
    def data(self) -> TrainingSet:
        """The training split, in the space that the denoiser works in."""
        images = load_training_set(self.recipe, "train", self.cache)
        self.known("denoiser", images.fingerprint)
        if self.recipe.autoencoder is None:
            return images
        return replace(images, x=encode_all(self.autoencoder(), images.x, self.accelerator.device))

    @cached_property
    def null(self) -> Condition:
        """The null condition of one row: the empty caption, or the class after the last."""
        if self.recipe.conditioning == "class":
            return {"label": torch.tensor(len(self.data.classes))}
        return {"context": encode_captions(("",), self.recipe.max_tokens, self.cache)[0].float()}

    def autoencoder(self) -> AutoencoderKL:
        """The trained autoencoder. Raises TrainingError if the stage is not done."""
        model = AutoencoderKL.from_pretrained(self._done("autoencoder"), local_files_only=True)
        return model.to(self.accelerator.device).eval().requires_grad_(False)

    def unet(self, stage: str) -> UNet2DConditionModel:
        """The trained network of a stage. Raises TrainingError if the stage is not done."""
        model = UNet2DConditionModel.from_pretrained(self._done(stage), local_files_only=True)
        return model.to(self.accelerator.device)

    def denoiser(self, stage: str) -> UNetDenoiser:
        """That network as a frozen Denoiser."""
        return UNetDenoiser(self.unet(stage), TIMESTEPS).eval().requires_grad_(False)

    def guided_teacher(self) -> GuidedTeacher:
        """The teacher with classifier-free guidance: two network calls a step."""
        network = self.denoiser("teacher")
        return GuidedTeacher(network, network, self.null)

    def is_done(self, stage: str) -> bool:
        """Whether a stage's network is there."""
        return (self.folder / stage / WEIGHTS).exists()

    def _done(self, stage: str) -> Path:
        if not self.is_done(stage):
            raise TrainingError(f"{self.folder / stage} holds no trained network")
        return self.folder / stage

    def finish(self, stage: str, model: AutoencoderKL | UNet2DConditionModel) -> None:
        """Save a stage's network; its checkpoint is of no more use."""
        partial = self.folder / f"{stage}.partial"
        model.save_pretrained(partial)
        for file in sorted(partial.iterdir(), key=lambda file: file.name == WEIGHTS):
            file.replace(self.folder / stage / file.name)
        partial.rmdir()
        (self.folder / stage / CHECKPOINT).unlink(missing_ok=True)


def student_stage(steps: int) -> str:
    """The name of the stage that makes the student of so many steps."""
    return f"student-{steps}"


def train_teacher(run: Run) -> None:
    """The autoencoder, if the recipe has one, and the teacher."""
    if run.recipe.autoencoder and not run.is_done("autoencoder"):
        _train_autoencoder(run)
    if not run.is_done("teacher"):
        _train_teacher(run)


def distill(run: Run) -> None:
    """Every stage that is not done: the teacher too."""
    train_teacher(run)
    if not run.is_done("stage1"):
        _match_outputs(run)
    previous = "stage1"
    for round_ in run.recipe.stage2.rounds:
        stage = student_stage(round_.steps)
        if not run.is_done(stage):
            _halve(run, round_, previous)
        previous = stage


def _train_autoencoder(run: Run) -> None:
    recipe = run.recipe.autoencoder
    assert recipe is not None
    images = load_pixels(run.recipe.data, "train")
    run.known("autoencoder", hash_of_array(images.numpy()))
    run.known("denoiser", load_training_set(run.recipe, "train", run.cache).fingerprint)
    torch.manual_seed(run.recipe.seed)
    network = build_autoencoder(recipe, run.recipe.data.size)
    order = BatchOrder(len(images), recipe.batch_size, run.recipe.seed)

    def loss(network: nn.Module, update: int, generator: Generator) -> Tensor:
        batch = images[order.at(update)].to(run.accelerator.device)
        return reconstruction_loss(network, batch, recipe, generator)

    def show(network: AutoencoderKL, path: Path) -> None:
        some = images[: SAMPLE_ROWS * SAMPLE_COLUMNS // 2].to(run.accelerator.device)
        with torch.inference_mode():
            save_grid(torch.cat([some, network(some, return_dict=False)[0]]), path, SAMPLE_COLUMNS)

    model = train(
        network,
        loss,
        recipe,
        run.folder / "autoencoder",
        seed=run.recipe.seed,
        sample=show,
        accelerator=run.accelerator,
        pace=run.pace,
    )
    some = images[torch.randperm(len(images), generator=generator_at(run.recipe.seed, 0, 4))[:SCALE_IMAGES]]
    model.register_to_config(scaling_factor=measure_scale(model, some, run.accelerator.device))
    run.finish("autoencoder", model)


def _train_teacher(run: Run) -> None:
    data, recipe = run.data, run.recipe.teacher
    context_dim = run.null["context"].shape[-1] if run.recipe.conditioning == "text" else None
    torch.manual_seed(run.recipe.seed)
    unet = build_unet(run.recipe.network, data.shape, context_dim, len(data.classes))
    order = BatchOrder(len(data), recipe.batch_size, run.recipe.seed)

    def loss(network: nn.Module, update: int, generator: Generator) -> Tensor:
        batch = data.batch(order.at(update), generator, run.accelerator.device)
        return teacher_loss(network, run.schedule, batch, run.null, recipe.drop_condition, generator)

    def guided(network: nn.Module) -> Denoiser:
        return GuidedTeacher(network, network, run.null)

    _train_denoiser(run, "teacher", unet, loss, recipe, TEACHER_SAMPLE_STEPS, guided)


def _match_outputs(run: Run) -> None:
    data, recipe, teacher = run.data, run.recipe.stage1, run.guided_teacher()
    order = BatchOrder(len(data), recipe.batch_size, run.recipe.seed + 1)

    def loss(network: nn.Module, update: int, generator: Generator) -> Tensor:
        batch = data.batch(order.at(update), generator, run.accelerator.device)
        return output_matching_loss(network, teacher, run.schedule, batch, run.recipe.guidance, generator)

    _train_denoiser(run, "stage1", student_from(run.unet("teacher")), loss, recipe, run.recipe.stage2.start)


def _halve(run: Run, recipe: Round, previous: str) -> None:
    data, teacher = run.data, run.denoiser(previous)
    order = BatchOrder(len(data), recipe.batch_size, run.recipe.seed + recipe.steps)

    def loss(network: nn.Module, update: int, generator: Generator) -> Tensor:
        batch = data.batch(order.at(update), generator, run.accelerator.device)
        return progressive_loss(network, teacher, run.schedule, batch, recipe.steps, run.recipe.guidance, generator)

    _train_denoiser(run, student_stage(recipe.steps), student_from(run.unet(previous)), loss, recipe, recipe.steps)


def _train_denoiser(
    run: Run,
    stage: str,
    unet: UNet2DConditionModel,
    loss: Callable[[nn.Module, int, Generator], Tensor],
    recipe: Optimisation,
    sample_steps: int,
    as_sampled: Callable[[nn.Module], Denoiser] = lambda network: network,
) -> None:
    def show(network: nn.Module, path: Path) -> None:
        save_grid(_samples(run, as_sampled(network), sample_steps), path, SAMPLE_COLUMNS)

    network = train(
        UNetDenoiser(unet, TIMESTEPS),
        loss,
        recipe,
        run.folder / stage,
        seed=run.recipe.seed,
        sample=show,
        accelerator=run.accelerator,
        pace=run.pace,
    )
    show(network, run.folder / stage / "samples.png")
    run.finish(stage, network.unet)


def _samples(run: Run, denoiser: Denoiser, steps: int) -> Tensor:
    """Images for a fixed choice of conditions, each row of the picture at another w."""
    device, count = run.accelerator.device, SAMPLE_ROWS * SAMPLE_COLUMNS
    generator = generator_at(run.recipe.seed, 0, 2)
    items = torch.linspace(0, len(run.data) - 1, SAMPLE_COLUMNS).long().repeat(SAMPLE_ROWS)
    noise = torch.randn(SAMPLE_COLUMNS, *run.data.shape, generator=generator).repeat(SAMPLE_ROWS, 1, 1, 1)
    w = torch.linspace(*run.recipe.guidance, SAMPLE_ROWS).repeat_interleave(count // SAMPLE_ROWS)
    batch = run.data.batch(items[:SAMPLE_COLUMNS], generator, device)
    condition = {name: value.repeat(SAMPLE_ROWS, *[1] * (value.ndim - 1)) for name, value in batch.condition.items()}
    z = sample(denoiser, run.schedule.grid(steps), noise.to(device), condition, w.to(device))
    return z if run.recipe.autoencoder is None else decode_all(run.autoencoder(), z)


@torch.inference_mode()
def encode_all(autoencoder: AutoencoderKL, images: Tensor, device: torch.device, rows: int = 256) -> Tensor:
    """Scaled latents (N, c, h, w) on the CPU of images (N, 3, H, W)."""
    return torch.cat([networks.encode(autoencoder, part.to(device)).cpu() for part in images.split(rows)])


@torch.inference_mode()
def decode_all(autoencoder: AutoencoderKL, latents: Tensor, rows: int = 256) -> Tensor:
    """Images (N, 3, H, W) of scaled latents (N, c, h, w)."""
    return torch.cat([networks.decode(autoencoder, part) for part in latents.split(rows)])
