"""A run: a recipe at work in a folder, and all that its stages share. Their order is distill.py's affair.

Every stage has a subfolder with its log, its samples and, when it is finished, its network as a diffusers pipeline.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from torch import Tensor

from training import networks
from training.autoencoder import AUTOENCODER_WEIGHTS, latent_shape, take_autoencoder
from training.capture import capture_network
from training.checkpoints import Checkpoints
from training.data.inpainting import all_masked
from training.data.shard_index import MadeWith
from training.data.training_set import Data
from training.diffusion import Schedule
from training.errors import TrainingError
from training.guidance import Condition, GuidedTeacher
from training.loop import shares
from training.networks import NetworkDenoiser, compile_network, load_network, of_side
from training.pretrained.pipelines import has_pipeline, save_stage, student_card
from training.pretrained.teachers import TeacherPipeline
from training.progress import Pace
from training.prompts import PromptEncoder
from training.recipe import Recipe
from training.run_data import training_data
from training.sections import CheckpointRecipe, OwnPrediction, ScheduleName, TeacherRecipe
from training.stages import AUTOENCODER, TEACHER, steps_of_student
from training.state import check_average
from training.store import hash_of, hash_of_files, sweep, whole_file
from training.text import MiniLMPrompts

RECORD = "recipe.json"
NETWORK = "unet"
LEFT_OUT_OF_RECORD = frozenset({"export", "scale"})
"""What does not touch what was trained: what is exported, under which words, and how it fits its machines."""

SCHEDULES = {
    "cosine": Schedule.cosine,
    "continuous-cosine": Schedule.continuous_cosine,
    "scaled-linear": Schedule.scaled_linear,
    "rectified-flow": Schedule.rectified_flow,
}


@dataclass(frozen=True)
class Run:
    """A recipe at work in a folder."""

    recipe: Recipe
    folder: Path
    accelerator: Accelerator
    pace: Pace = Pace()

    def __post_init__(self) -> None:
        """Claim the folder for the recipe.

        Raises TrainingError if another recipe, or autoencoder, has it, or for what the processes cannot share.
        """
        _ = self.pipeline, self.unconditional  # a recipe that names an unfit one claims nothing
        for ladder in filter(None, (self.recipe.stage2, self.recipe.encoder)):
            if ladder.start > self.schedule.timesteps:
                raise TrainingError(f"{ladder.start} steps cannot be taken on {self.schedule.timesteps} timesteps")
        for stage in self.recipe.stages:
            shares(stage.batch_size, self.accelerator)
            check_average(stage, self.accelerator)
        if self.recipe.scale.capture and self.accelerator.num_processes > 1:
            raise TrainingError("scale.capture is for one process")
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.accelerator.is_main_process:
            sweep(self.folder)
        ours = json.loads(self.recipe.portable_json())
        theirs = self._recorded(RECORD, ours)
        if changed := [name for name in self.recipe.differences(theirs) if name not in LEFT_OUT_OF_RECORD]:
            raise TrainingError(
                f"{self.folder} was made with another recipe (it differs in: {', '.join(changed)}); "
                "choose another folder, or edit its recipe.json if you mean to go on: finished stages stay as they "
                "were made, so remove the folders of those that are to be trained anew, and of all stages after them"
            )
        if self.recipe.data.autoencoder is not None:
            with self.accelerator.main_process_first():
                take_autoencoder(self.recipe.data.autoencoder, self.folder / AUTOENCODER)

    def _recorded(self, name: str, ours: dict[str, Any]) -> dict[str, Any]:
        """What a record of the run says; at first, what we write into it. Raises TrainingError for a broken one."""
        record = self.folder / name
        with self.accelerator.main_process_first():
            if not record.exists():
                with whole_file(record) as partial:
                    partial.write_text(json.dumps(ours, indent=1))
        try:
            theirs: dict[str, Any] = json.loads(record.read_text())
        except ValueError as error:
            raise TrainingError(f"{record} is not JSON: {error}") from error
        if not isinstance(theirs, dict):
            raise TrainingError(f"{record} holds no JSON object")
        return theirs

    def known(self, use: str, fingerprint: str) -> None:
        """Note the data, or what of a teacher, the run uses. Raises TrainingError for others than before."""
        if self._recorded(f"data-{use}.json", {"sha256": fingerprint}).get("sha256") != fingerprint:
            raise TrainingError(
                f"{self.folder} was begun with other images, captions or classes than are there now, or with "
                f"another teacher (its {use} differs); bring those back, choose another folder, or remove its "
                f"data-{use}.json if you mean to go on"
            )

    def know_checkpoint(self) -> None:
        """Note the checkpoint that the teacher is, if it is one. Raises TrainingError for another than before."""
        if self.pipeline is not None:
            self.known(TEACHER, self.weights(TEACHER))

    @property
    def device(self) -> torch.device:
        """Where networks are."""
        device: torch.device = self.accelerator.device
        return device

    @property
    def cache(self) -> Path:
        """Where encoded captions are kept."""
        return self.folder / "cache"

    @cached_property
    def pipeline(self) -> TeacherPipeline | None:
        """The pipeline that the teacher comes from; None if it is trained here. Raises TeacherError if it is unfit.

        Raises TrainingError for another kind of condition than the recipe's.
        """
        teacher = self.recipe.teacher
        if isinstance(teacher, TeacherRecipe):
            return None
        pipeline = TeacherPipeline.open(teacher.checkpoint, teacher.revision, teacher.variant)
        if pipeline.is_text != (self.recipe.conditioning == "text"):
            kind = "prompts" if pipeline.is_text else "classes"
            raise TrainingError(f"{pipeline.folder} is conditioned on {kind}, the recipe on {self.recipe.conditioning}")
        pipeline.check_side(self.recipe.data.size)
        if not pipeline.is_text and teacher.unconditional is None:
            pipeline.classes.null(teacher.null_class)
        return pipeline

    @cached_property
    def unconditional(self) -> TeacherPipeline | None:
        """The second pipeline of a teacher of two networks. Raises as the first does, and for another schedule."""
        teacher = self.recipe.teacher
        if self.pipeline is None or not isinstance(teacher, CheckpointRecipe) or teacher.unconditional is None:
            return None
        second = TeacherPipeline.open(
            teacher.unconditional, teacher.unconditional_revision, teacher.unconditional_variant
        )
        second.check_side(self.recipe.data.size)
        self.pipeline.check_pair(second)
        same = second.schedule.angles.shape == self.schedule.angles.shape
        if not same or not torch.allclose(second.schedule.angles, self.schedule.angles, atol=1e-6):
            raise TrainingError(f"{second.folder} and {self.pipeline.folder} have different noise schedules")
        return second

    @cached_property
    def schedule(self) -> Schedule:
        """The schedule that every stage shares."""
        if self.pipeline is not None:
            return self.pipeline.schedule
        name: ScheduleName = self.recipe.teacher.schedule  # type: ignore[union-attr]
        return SCHEDULES[name]()

    @property
    def prediction(self) -> OwnPrediction:
        """What the networks that are trained here predict."""
        return "v" if self.recipe.network is None else self.recipe.network.prediction

    @property
    def is_latent(self) -> bool:
        """Whether z is an autoencoder's latent."""
        if self.pipeline is not None:
            return self.pipeline.autoencoder_class is not None
        return self.recipe.autoencoder is not None or self.recipe.data.autoencoder is not None

    @cached_property
    def prompts(self) -> PromptEncoder | None:
        """What encodes captions; None for classes. Raises TrainingError for other text encoders than before."""
        if self.recipe.conditioning == "class":
            return None
        if self.pipeline is None:
            return MiniLMPrompts(self.recipe.max_tokens, self.device)
        prompts = self.pipeline.prompts(self.device)
        self.known("prompts", prompts.identity)
        return prompts

    @cached_property
    def data(self) -> Data:
        """The training split, in the space that the denoiser works in. Raises TrainingError if it does not fit."""
        return training_data(self)

    def made_with(self, classes: tuple[str, ...]) -> MadeWith:
        """What makes x and its condition of images. Raises TrainingError if the autoencoder is not trained yet."""
        return MadeWith(
            autoencoder=self.weights(AUTOENCODER) if self.is_latent else None,
            prompts=self.prompts.identity if self.prompts else None,
            classes=classes,
            fit="crop" if self.recipe.data.fit == "crop" else None,
        )

    @property
    def class_numbers(self) -> Tensor:
        """The teacher's number (K,) of each of the K classes of the data."""
        return self.numbers_of(self.data.classes)

    def numbers_of(self, classes: tuple[str, ...]) -> Tensor:
        """The teacher's numbers (K,) of K classes. Raises TrainingError for others than before."""
        if self.pipeline is None:
            return torch.arange(len(classes))
        numbers = self.pipeline.classes.numbers(classes)
        self.known("classes", hash_of({"numbers": numbers.tolist()}))
        return numbers

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """The shape (c, h, w) of z. Raises TrainingError if the images do not fit an autoencoder of another run."""
        side, halvings, channels = self.recipe.data.size, 0, 3
        if self.pipeline is not None:
            channels = self.pipeline.channels
            halvings = self.pipeline.autoencoder_halvings
        elif self.recipe.autoencoder is not None:
            channels = self.recipe.autoencoder.latent_channels
            halvings = len(self.recipe.autoencoder.channels) - 1
        elif self.recipe.data.autoencoder is not None:
            return latent_shape(self.autoencoder(), self.recipe)
        return channels, side >> halvings, side >> halvings

    @cached_property
    def constants(self) -> Condition:
        """Conditions that are the same for every row: SDXL's sizes, and for inpainting that all is masked."""
        if self.pipeline is None:
            return {}
        side = float(self.recipe.data.size)
        constants: dict[str, Tensor] = {}
        if self.pipeline.is_xl:
            constants["size"] = torch.tensor([side, side, 0.0, 0.0, side, side])
        if self.pipeline.is_inpainting:
            constants.update(all_masked(self.autoencoder(), self.recipe.data.size))
        return constants

    @cached_property
    def null(self) -> Condition:
        """The null condition of one row: the empty caption, or the class for none."""
        if self.prompts is not None:
            return self.prompts.null
        if self.pipeline is None:
            return {"label": torch.tensor(len(self.data.classes))}
        return self.null_beside(self.class_numbers)

    def null_beside(self, numbers: Tensor) -> Condition:
        """That of a checkpoint's class teacher. Raises TrainingError where it is one of the classes' `numbers` (K,)."""
        teacher, second = self.recipe.teacher, self.unconditional
        assert self.pipeline is not None
        assert isinstance(teacher, CheckpointRecipe)
        if second is not None and not second.classes.count and teacher.null_class is None:
            return {}
        without = second or self.pipeline
        label = without.classes.null(teacher.null_class)
        if label in numbers:
            raise TrainingError(
                f"{without.folder} has no class left that stands for none: name one as null_class, or a second "
                "pipeline without classes as unconditional"
            )
        return {"label": torch.tensor(label)}

    def autoencoder(self) -> AutoencoderKL:
        """The autoencoder, loaded once. Raises TrainingError if its stage is not done."""
        return self._autoencoder

    @cached_property
    def _autoencoder(self) -> AutoencoderKL:
        if self.pipeline is not None:
            model = self.pipeline.autoencoder()
            assert model is not None
        else:
            self.check_done(AUTOENCODER)
            model = AutoencoderKL.from_pretrained(self.folder / AUTOENCODER, local_files_only=True)
        return model.to(self.device).eval().requires_grad_(False)

    def decoded(self, z: Tensor) -> Tensor:
        """Images (B, 3, H, W) of z (B, c, h, w), in -1..1. Raises TrainingError if the autoencoder is not done."""
        return networks.decode_all(self.autoencoder(), z) if self.is_latent else z

    def denoiser(self, stage: str) -> NetworkDenoiser:
        """The network of a stage as a frozen Denoiser. Raises TrainingError if it is not done, or cannot be read."""
        if stage == TEACHER and self.pipeline is not None:
            return self.pipeline.denoiser().to(self.device)
        self.check_done(stage)
        folder = self.folder / stage / self.network_part
        try:
            denoiser = load_network(folder, self.schedule, self.prediction)
        except (ValueError, KeyError, SafetensorError) as error:
            raise TrainingError(f"{folder}: the network of a stage that is done cannot be read ({error})") from error
        return denoiser.to(self.device).eval().requires_grad_(False)

    def guided_teacher(self) -> GuidedTeacher:
        """The teacher with classifier-free guidance: two network calls a step."""
        null = self.null  # before the networks, as there may be none
        network = self.compiled(self.denoiser(TEACHER))
        second = network if self.unconditional is None else self.compiled(self.unconditional.denoiser().to(self.device))
        return GuidedTeacher(network, second, null)

    def compiled(self, denoiser: NetworkDenoiser) -> NetworkDenoiser:
        """The denoiser, compiled or captured if the recipe says so."""
        if self.recipe.scale.compile:
            compile_network(denoiser.network)
        if self.recipe.scale.capture:
            capture_network(denoiser)
        return denoiser

    @property
    def network_part(self) -> str:
        """The subfolder of a stage that holds its network, as diffusers calls it."""
        return NETWORK if self.pipeline is None else self.pipeline.part

    def is_done(self, stage: str) -> bool:
        """Whether a stage's network is there."""
        if stage == AUTOENCODER:
            return (self.folder / stage / AUTOENCODER_WEIGHTS).exists()
        return (stage == TEACHER and self.pipeline is not None) or (self.folder / stage / self.network_part).is_dir()

    def tidy(self, *stages: str) -> None:
        """Remove what stages that are done left when they were killed while they finished."""
        for stage in stages:
            if self.accelerator.is_main_process and (self.folder / stage).is_dir():
                Checkpoints(self.folder / stage).remove()

    def check_done(self, stage: str) -> None:
        """Raise TrainingError if a stage's network is not there."""
        if not self.is_done(stage):
            raise TrainingError(f"{self.folder / stage} holds no trained network")

    def weights(self, stage: str) -> str:
        """A hash of the weights of a stage; of a teacher from a checkpoint, of all that it predicts by.

        Raises TrainingError if the stage is not done, or its weights are gone.
        """
        if self.pipeline is not None and stage == AUTOENCODER:
            return hash_of_files(self.pipeline.files("vae"))
        if self.pipeline is not None and stage == TEACHER:
            second = None if self.unconditional is None else self.unconditional.identity
            predicts_by = {"conditional": self.pipeline.identity, "unconditional": second}
            assert isinstance(self.recipe.teacher, CheckpointRecipe)
            if (null_class := self.recipe.teacher.null_class) is not None:
                predicts_by["null_class"] = str(null_class)
            return hash_of(predicts_by)
        self.check_done(stage)
        folder = self.folder / stage / (self.network_part if stage != AUTOENCODER else "")
        if not (files := sorted(folder.glob("*.safetensors"))):
            raise TrainingError(f"{folder}: the weights of a stage that is done are gone")
        return hash_of_files(files)

    def finish(self, stage: str, network: NetworkDenoiser | AutoencoderKL) -> None:
        """Save a stage's network, whole or not at all; its checkpoints are of no more use.

        Raises TrainingError if it cannot be written; then the checkpoints that there are stay.
        """
        folder = self.folder / stage
        checkpoints = Checkpoints(folder)
        if self.accelerator.is_main_process:
            try:
                if (steps := steps_of_student(stage)) is not None:
                    assert isinstance(network, NetworkDenoiser)
                    card = student_card(self.recipe, steps, self.schedule.timesteps, has_pipeline(network))
                    (folder / "README.md").write_text(card)
                if self.pipeline is not None and isinstance(network, NetworkDenoiser):
                    of_side(network, self.shape[-1])
                save_stage(folder, self.network_part, network, self.pipeline, self.recipe.max_tokens)
            except (OSError, SafetensorError) as error:
                kept = "its checkpoint is kept" if checkpoints.any else "and has no checkpoint, so it begins anew"
                raise TrainingError(f"{folder} was not saved, {kept}: {error}") from error
            checkpoints.remove()
        self.accelerator.wait_for_everyone()
