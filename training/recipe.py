"""A recipe: everything that a run depends on, in one TOML file, as frozen models. Knows no torch."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Positive = Annotated[int, Field(gt=0, strict=True)]
Level = Annotated[int, Field(ge=0, le=255, strict=True)]
Channels = Annotated[tuple[Positive, ...], Field(min_length=1)]
TIMESTEPS = 1024
MAX_SEED = 2**62


class RecipeError(Exception):
    """A recipe that cannot be read; the message names the file and the field."""


class Section(BaseModel):
    """What all parts of a recipe share: they are immutable and refuse unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Optimisation(Section):
    """How one stage is optimised: Adam with decoupled weight decay, gradient clipping, optional EMA."""

    updates: Positive
    batch_size: Positive = 64
    learning_rate: float = Field(gt=0)
    decay: Literal["constant", "linear", "cosine"] = "linear"
    warmup: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0)
    ema: float = Field(default=0.0, ge=0, lt=1)


class DataRecipe(Section):
    """Which images: an imagefolder (or shards) on disk, or scikit-learn's digits."""

    source: Literal["folder", "digits"] = "folder"
    path: Path | None = None
    size: Positive
    background: tuple[Level, Level, Level] = (255, 255, 255)
    groups: tuple[str, ...] = ()

    @model_validator(mode="after")
    def folder_has_path(self) -> Self:
        """A folder needs its path; the digits are what they are."""
        if self.source == "folder" and self.path is None:
            raise ValueError("source 'folder' needs a path")
        if self.source == "digits" and (unfit := self.model_fields_set & {"path", "background", "groups"}):
            raise ValueError(f"source 'digits' takes no {', '.join(sorted(unfit))}")
        return self

    def at(self, path: Path) -> DataRecipe:
        """The same images, found at another path. Raises RecipeError for a source that has no path."""
        if self.source == "digits":
            raise RecipeError("the recipe's images are scikit-learn's digits: they lie in no folder")
        return self.model_copy(update={"path": path.absolute()})


class AutoencoderRecipe(Optimisation):
    """An autoencoder trained here. The latent's side is the image's divided by 2 ** (levels - 1)."""

    latent_channels: Positive = 8
    channels: Channels
    layers_per_block: Positive = 1
    norm_groups: Positive = 16
    kl_weight: float = Field(default=1e-6, ge=0)
    gradient_weight: float = Field(default=1.0, ge=0)


class NetworkRecipe(Section):
    """The denoiser, a UNet2DConditionModel."""

    channels: Channels
    layers_per_block: Positive = 1
    attention_heads: Positive = Field(default=4, description="Of networks that attend to text.")
    norm_groups: Positive = 32


class TeacherRecipe(Optimisation):
    """Training from scratch; the condition of a share `drop_condition` of the rows is dropped."""

    drop_condition: float = Field(default=0.1, gt=0, lt=1)


class Round(Optimisation):
    """One halving of stage 2: the round that makes the student of `steps` steps from that of twice as many."""

    steps: Positive


class Stage2Recipe(Section):
    """Progressive distillation; `start` is the number of steps in which the first round's teacher is sampled."""

    start: Positive
    rounds: tuple[Round, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def rounds_halve(self) -> Self:
        """Every round halves the steps of the one before, and all of them divide the timesteps."""
        steps = self.start
        if TIMESTEPS % steps:
            raise ValueError(f"start = {steps} does not divide the {TIMESTEPS} timesteps")
        for round_ in self.rounds:
            if round_.steps * 2 != steps:
                raise ValueError(f"a round to {round_.steps} steps cannot follow {steps} steps: each round halves")
            steps = round_.steps
        return self


class ExportRecipe(Section):
    """What the bundle is made of: which students, and under which licence it goes out."""

    steps: tuple[Positive, ...] = Field(default=(4, 2, 1), min_length=1)
    licence: str
    title: str = ""
    notes: str = Field(default="", description="What its users should know; it goes into the model card.")


class Recipe(Section):
    """A whole run: data -> (autoencoder) -> teacher -> stage 1 -> stage 2."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="Of the networks' arithmetic in training. Weights are fp32 in both."
    )
    conditioning: Literal["text", "class"]
    guidance: tuple[float, float] = (0.0, 4.0)
    default_guidance: float = 1.0
    max_tokens: int = Field(default=32, ge=3, le=512, description="With the two that begin and end a caption.")
    data: DataRecipe
    autoencoder: AutoencoderRecipe | None = None
    network: NetworkRecipe
    teacher: TeacherRecipe
    stage1: Optimisation
    stage2: Stage2Recipe
    export: ExportRecipe

    @model_validator(mode="after")
    def guidance_is_a_range(self) -> Self:
        """0 <= w_min <= default <= w_max."""
        low, high = self.guidance
        if not 0 <= low <= self.default_guidance <= high:
            raise ValueError("guidance must be [w_min, w_max] with 0 <= w_min <= default_guidance <= w_max")
        return self

    @model_validator(mode="after")
    def conditioning_fits(self) -> Self:
        """Digits have classes and no captions; what only text needs is refused for classes."""
        if self.conditioning == "text":
            if self.data.source == "digits":
                raise ValueError("the digits have no captions: conditioning must be 'class'")
            if unfit := [c for c in self.network.channels if c % self.network.attention_heads]:
                raise ValueError(f"network: {unfit[0]} channels do not divide into attention_heads")
        elif "max_tokens" in self.model_fields_set or "attention_heads" in self.network.model_fields_set:
            raise ValueError("max_tokens and network.attention_heads are of text conditioning only")
        return self

    @model_validator(mode="after")
    def shapes_fit(self) -> Self:
        """Every level of a network halves the side; normalisation divides its channels into equal groups."""
        side = self.data.size
        for name, part in (("autoencoder", self.autoencoder), ("network", self.network)):
            if part is None:
                continue
            halvings = 2 ** (len(part.channels) - 1)
            if side % halvings:
                raise ValueError(f"{name}: a side of {side} cannot be halved {len(part.channels) - 1} times")
            if unfit := [c for c in part.channels if c % part.norm_groups]:
                raise ValueError(f"{name}: {unfit[0]} channels do not divide into {part.norm_groups} norm_groups")
            side //= halvings
        return self

    @model_validator(mode="after")
    def exported_students_are_trained(self) -> Self:
        """Only students that stage 2 makes can be exported."""
        trained = {round_.steps for round_ in self.stage2.rounds}
        if missing := sorted(set(self.export.steps) - trained):
            raise ValueError(f"export.steps asks for {missing}, stage2 trains {sorted(trained)}")
        if len(set(self.export.steps)) != len(self.export.steps):
            raise ValueError("export.steps names a student twice")
        return self

    def portable_json(self) -> str:
        """The recipe as JSON without where the data lies, which may differ from machine to machine."""
        return self.model_dump_json(exclude={"data": {"path"}})

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Read a TOML file. Raises RecipeError with the file's name and each faulty field."""
        try:
            return cls.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, ValidationError) as error:
            raise RecipeError(f"{path}: {error}") from error
