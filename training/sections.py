"""The sections of a recipe, as frozen models, each with the laws of its own. Knows no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

Positive = Annotated[int, Field(gt=0, strict=True)]
Level = Annotated[int, Field(ge=0, le=255, strict=True)]
Channels = Annotated[tuple[Positive, ...], Field(min_length=1)]
Weighting = Literal["truncated-snr", "clamped-snr", "snr-plus-one", "uniform"]
OwnPrediction = Literal["v", "x"]
ScheduleName = Literal["cosine", "continuous-cosine", "scaled-linear", "rectified-flow"]


BOUNDED: tuple[Weighting, ...] = ("clamped-snr", "uniform")
"""Weights of an error of x that do not grow without bound as t goes to 0."""


class RecipeError(Exception):
    """A recipe that cannot be read; the message names the file and the field."""


class Section(BaseModel):
    """What all parts of a recipe share: they are immutable and refuse unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Only switches take true and false, which Python would count as 1 and 0."""
        given = value if isinstance(value, (list, tuple)) else [value]
        is_switch = cls.model_fields[str(info.field_name)].annotation is bool
        if not is_switch and any(isinstance(one, bool) for one in given):
            raise ValueError("true and false are not accepted here")
        return value


class Optimisation(Section):
    """How one stage is optimised: Adam with decoupled weight decay, gradient clipping, optional EMA.

    With `validate_every` a distance is taken every so many updates and after the last; the best network is kept, and
    the stage ends when `patience` of them in a row brought nothing. In a round it is that of the student's images from
    its teacher's, at equal noise, elsewhere the stage's loss, always of the same data, times and noise.
    """

    updates: Positive
    batch_size: Positive = 64
    learning_rate: float = Field(gt=0)
    decay: Literal["constant", "linear", "cosine"] = "linear"
    warmup: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0)
    ema: float = Field(default=0.0, ge=0, lt=1)
    spike: float = Field(
        default=20.0, gt=1, description="An update whose loss is so many times the median of the last ones is skipped."
    )
    skip_limit: int = Field(
        default=10, ge=0, lt=100, description="A run in which more of the last hundred updates were skipped stops."
    )
    validate_every: int = Field(default=0, ge=0)
    patience: Positive = 3

    @model_validator(mode="after")
    def warm_up_ends(self) -> Self:
        """The learning rate is reached before the stage is over."""
        if self.warmup >= self.updates:
            raise ValueError(f"a warmup of {self.warmup} updates does not end within {self.updates}")
        return self

    @model_validator(mode="after")
    def validations_happen(self) -> Self:
        """A stage that is to be validated is so at least once."""
        if self.validate_every > self.updates:
            raise ValueError(f"validate_every = {self.validate_every} never happens within {self.updates} updates")
        if "patience" in self.model_fields_set and not self.validate_every:
            raise ValueError("patience counts validations: without validate_every there are none")
        return self


class Distillation(Optimisation):
    """How a student learns from its teacher; `weighting` is omega(SNR) of the squared error of x."""

    weighting: Weighting = "truncated-snr"


class DataRecipe(Section):
    """Which images: an imagefolder (or shards) on disk, scikit-learn's digits, or shards that are streamed.

    Those that are not square are padded, or with `fit` "crop" cut to the square in their middle, as photos want it.
    A stream has an `address`, a folder or any that fsspec knows, and mixes `window` shards at a time; its `classes`
    are named here, if it has any, and so is the folder of the `autoencoder` that makes its latents, if it was trained
    in another run.
    """

    source: Literal["folder", "digits", "stream"] = "folder"
    path: Path | None = None
    address: str | None = None
    size: Positive
    background: tuple[Level, Level, Level] = (255, 255, 255)
    fit: Literal["pad", "crop"] = "pad"
    groups: tuple[str, ...] = ()
    window: Positive = 2
    classes: tuple[str, ...] = ()
    autoencoder: Path | None = None

    @model_validator(mode="after")
    def source_is_whole(self) -> Self:
        """A folder needs its path and a stream its address; the digits are what they are."""
        if self.source == "folder" and self.path is None:
            raise ValueError("source 'folder' needs a path")
        if self.source == "stream" and self.address is None:
            raise ValueError("source 'stream' needs an address")
        foreign = {
            "folder": {"address", "window", "classes", "autoencoder"},
            "digits": {"address", "window", "classes", "autoencoder", "path", "background", "fit", "groups"},
            "stream": {"path", "groups"},
        }
        if unfit := self.model_fields_set & foreign[self.source]:
            raise ValueError(f"source '{self.source}' takes no {', '.join(sorted(unfit))}")
        if not all(self.classes) or len(set(self.classes)) != len(self.classes):
            raise ValueError("classes have names, each its own")
        return self

    def at(self, path: Path) -> DataRecipe:
        """The same images, found at another path. Raises RecipeError for a source that has no path."""
        if self.source == "digits":
            raise RecipeError("the recipe's images are scikit-learn's digits: they lie in no folder")
        place = {"address": str(path.absolute())} if self.source == "stream" else {"path": path.absolute()}
        return self.model_copy(update=place)


class AutoencoderRecipe(Optimisation):
    """An autoencoder trained here. The latent's side is the image's divided by 2 ** (levels - 1)."""

    latent_channels: Positive = 8
    channels: Channels
    layers_per_block: Positive = 1
    norm_groups: Positive = 16
    kl_weight: float = Field(default=1e-6, ge=0)
    gradient_weight: float = Field(default=1.0, ge=0)


class NetworkRecipe(Section):
    """The denoiser, a UNet2DConditionModel, and its students.

    What predicts v must tell of all noise that z has; what predicts `x` need not, and sooner leaves flat grounds flat.
    """

    channels: Channels
    prediction: OwnPrediction = "v"
    layers_per_block: Positive = 1
    attention_heads: Positive = Field(default=4, description="Of networks that attend to text.")
    norm_groups: Positive = 32

    def check_side(self, side: int) -> None:
        """Raise ValueError for a side, in pixels or of a latent, that the network cannot see."""
        halvings = len(self.channels) - 1
        if side < 2**halvings:
            raise ValueError(f"network: a side of {side} cannot be halved {halvings} times")


def halved(name: str, side: int, halvings: int) -> int:
    """The side of a latent. Raises ValueError, with the name of what halves, for one that does not come out whole."""
    if side % 2**halvings:
        raise ValueError(f"{name}: a side of {side} cannot be halved {halvings} times")
    return side >> halvings


class TeacherRecipe(Optimisation):
    """Training from scratch; the condition of a share `drop_condition` of the rows is dropped.

    `weighting` is omega(SNR) of the squared error of x; SNR + 1 is the squared error of v.
    """

    drop_condition: float = Field(default=0.1, gt=0, lt=1)
    weighting: Weighting = "snr-plus-one"
    schedule: ScheduleName = "cosine"


class CheckpointRecipe(Section):
    """A guided teacher that is there: a diffusers pipeline, as a folder or by its name on a hub.

    `unconditional` is a second pipeline whose network predicts without the condition; without it the network itself
    does so, given the null condition: the empty prompt, or the class `null_class` (by default the last). A second
    network that knows classes is given that of its own.
    """

    checkpoint: str = Field(min_length=1)
    revision: str | None = None
    variant: str | None = None
    unconditional: str | None = None
    unconditional_revision: str | None = None
    unconditional_variant: str | None = None
    null_class: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def one_way_without_condition(self) -> Self:
        """What tells of a second network goes with its name."""
        of_second = sorted(self.model_fields_set & {"unconditional_revision", "unconditional_variant"})
        if of_second and self.unconditional is None:
            raise ValueError(f"{of_second[0]} goes with unconditional, which names the pipeline")
        return self


def _kind_of_teacher(value: Any) -> str:
    given = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    return "checkpoint" if "checkpoint" in given else "trained"


Teacher = Annotated[
    Annotated[TeacherRecipe, Tag("trained")] | Annotated[CheckpointRecipe, Tag("checkpoint")],
    Discriminator(_kind_of_teacher),
]


class Round(Distillation):
    """One round of stage 2: it makes the student of `steps` steps from the one before it, which takes twice as many.

    It may take any other whole number of times as many, so that a ladder reaches 1 from every start: a round then asks
    its teacher that often.

    A `stochastic` student is for the sampler that takes 2 `steps` calls, of which each but the last is followed by
    noise.
    """

    steps: Positive
    stochastic: bool = False


class Stage2Recipe(Section):
    """Progressive distillation; `start` is the number of steps in which the first round's teacher is sampled."""

    start: Positive
    rounds: tuple[Round, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def rounds_divide(self) -> Self:
        """A step of each round replaces two or more whole ones of the round before, of a stochastic one two."""
        for round_, steps in zip(self.rounds, self.teachers_steps(), strict=True):
            if steps % round_.steps or steps == round_.steps:
                raise ValueError(
                    f"a round to {round_.steps} steps cannot follow {steps} steps: "
                    "each step replaces two or more whole ones"
                )
            if round_.stochastic and steps != 2 * round_.steps:
                raise ValueError(f"a stochastic round halves: {round_.steps} steps cannot follow {steps}")
        return self

    def teachers_steps(self) -> list[int]:
        """The steps of each round's teacher."""
        return [self.start, *(round_.steps for round_ in self.rounds[:-1])]


class EncoderRecipe(Stage2Recipe):
    """The same in reverse time: students that encode images in few steps.

    (Meng et al. 2023, "Progressive distillation for encoding".)
    """

    @model_validator(mode="after")
    def encoders_are_deterministic(self) -> Self:
        """Noise has no place in an encoder."""
        if any(round_.stochastic for round_ in self.rounds):
            raise ValueError("an encoder cannot be stochastic")
        return self

    @model_validator(mode="after")
    def encoders_learn_their_first_step(self) -> Self:
        """It starts from clean data, where sigma is 0 and so is what bounded weights multiply an error of v by."""
        if unfit := [round_.weighting for round_ in self.rounds if round_.weighting in BOUNDED]:
            raise ValueError(f"weighting '{unfit[0]}' teaches an encoder nothing of its first step: choose another")
        return self


class ScaleRecipe(Section):
    """How a run fits its machines. Nothing here changes what is computed, but for rounding.

    `micro_batch` rows at most pass a network at once; gradients add up over the batch. `capture` replays the launches
    of CUDA's kernels, which are most of a small network's time; other devices have none.
    """

    micro_batch: Positive | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    capture: bool = False

    @model_validator(mode="after")
    def captured_alone(self) -> Self:
        """What is captured is of whole batches, and of networks as they are."""
        if self.capture and (self.micro_batch or self.gradient_checkpointing or self.compile):
            raise ValueError("capture goes without micro_batch, gradient_checkpointing and compile")
        return self


class ExportRecipe(Section):
    """What the bundle is made of: which students, and under which licence it goes out."""

    steps: tuple[Positive, ...] = Field(default=(4, 2, 1), min_length=1)
    licence: str = Field(min_length=1)
    title: str = ""
    notes: str = Field(default="", description="What its users should know; it goes into the model card.")
