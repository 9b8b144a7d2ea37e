"""A recipe: everything that a run depends on, in one TOML file, as frozen models. Knows no torch."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from engines.problems import problem_of
from training.sections import (
    BOUNDED,
    AutoencoderRecipe,
    CheckpointRecipe,
    DataRecipe,
    Distillation,
    EncoderRecipe,
    ExportRecipe,
    NetworkRecipe,
    Optimisation,
    RecipeError,
    ScaleRecipe,
    Section,
    Stage2Recipe,
    Teacher,
    TeacherRecipe,
    halved,
)

MAX_SEED = 2**62


def _agree(ours: Any, theirs: Any, given: Any) -> bool:
    """Whether values are the same, or ours have by default what theirs lack; `given` are ours that are not defaults."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        given = given or {}
        if not theirs.keys() <= ours.keys() or not given.keys() <= theirs.keys():
            return False
        return all(_agree(ours[name], value, given.get(name)) for name, value in theirs.items())
    if isinstance(ours, list) and isinstance(theirs, list):
        given = given or [None] * len(ours)
        return len(ours) == len(theirs) and all(map(_agree, ours, theirs, given))
    return bool(ours == theirs)


class Recipe(Section):
    """A whole run: data -> (autoencoder) -> teacher -> stage 1 -> stage 2."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=100)
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
    network: NetworkRecipe | None = None
    teacher: Teacher
    stage1: Distillation
    stage2: Stage2Recipe
    encoder: EncoderRecipe | None = None
    scale: ScaleRecipe = ScaleRecipe()
    export: ExportRecipe

    @model_validator(mode="after")
    def guidance_is_a_range(self) -> Self:
        """0 <= w_min <= default <= w_max."""
        low, high = self.guidance
        if not 0 <= low <= self.default_guidance <= high:
            raise ValueError("guidance must be [w_min, w_max] with 0 <= w_min <= default_guidance <= w_max")
        return self

    @model_validator(mode="after")
    def teacher_is_whole(self) -> Self:
        """A teacher that is trained has a network; a checkpoint brings its own, and all that goes with it."""
        if isinstance(self.teacher, TeacherRecipe):
            if self.network is None:
                raise ValueError("a teacher that is trained here needs a network")
        elif unfit := self.model_fields_set & {"network", "autoencoder", "max_tokens"}:
            raise ValueError(f"a teacher from a checkpoint brings its own {', '.join(sorted(unfit))}")
        elif self.data.autoencoder is not None:
            raise ValueError("a teacher from a checkpoint brings its own autoencoder: data.autoencoder names another")
        return self

    @model_validator(mode="after")
    def conditioning_fits(self) -> Self:
        """Digits have classes and no captions; what only text needs is refused for classes."""
        if self.data.source == "stream" and bool(self.data.classes) != (self.conditioning == "class"):
            raise ValueError("a stream names its classes if, and only if, they are the condition")
        if self.data.source == "stream" and self.autoencoder is not None:
            raise ValueError(
                "an autoencoder is trained on a folder of images: precompute with that recipe, and name the folder of "
                "its autoencoder as data.autoencoder here"
            )
        if self.conditioning == "text":
            if self.data.source == "digits":
                raise ValueError("the digits have no captions: conditioning must be 'class'")
            if isinstance(self.teacher, CheckpointRecipe) and self.teacher.null_class is not None:
                raise ValueError("teacher.null_class is of classes: for text, the empty prompt stands for none")
            if self.network and (unfit := [c for c in self.network.channels if c % self.network.attention_heads]):
                raise ValueError(f"network: {unfit[0]} channels do not divide into attention_heads")
        elif "max_tokens" in self.model_fields_set or (
            self.network and "attention_heads" in self.network.model_fields_set
        ):
            raise ValueError("max_tokens and network.attention_heads are of text conditioning only")
        return self

    @model_validator(mode="after")
    def predicted_x_is_weighted(self) -> Self:
        """The error of a predicted x does not vanish with t, as that of a predicted v does."""
        if self.network is None or self.network.prediction == "v":
            return self
        assert isinstance(self.teacher, TeacherRecipe)
        for name, weighting in (("teacher", self.teacher.weighting), ("stage1", self.stage1.weighting)):
            if weighting not in BOUNDED:
                raise ValueError(
                    f"{name}.weighting '{weighting}' grows without bound as t goes to 0, where the error of a "
                    f"predicted x does not vanish: choose one of {', '.join(BOUNDED)}"
                )
        if self.encoder is not None:
            raise ValueError("an encoder starts from clean data, where a predicted x says nothing: predict v")
        return self

    @model_validator(mode="after")
    def captured_networks_are_small(self) -> Self:
        """Others have no need of it; what it captures is fp32."""
        if self.scale.capture and (self.network is None or self.precision != "fp32"):
            raise ValueError("scale.capture is for networks that are trained from scratch, with precision fp32")
        return self

    @model_validator(mode="after")
    def shapes_fit(self) -> Self:
        """Every level halves the side, exactly in an autoencoder; normalisation divides channels into equal groups."""
        side = self.data.size
        for name, part in (("autoencoder", self.autoencoder), ("network", self.network)):
            if part is None:
                continue
            if unfit := [c for c in part.channels if c % part.norm_groups]:
                raise ValueError(f"{name}: {unfit[0]} channels do not divide into {part.norm_groups} norm_groups")
            if isinstance(part, NetworkRecipe):
                part.check_side(side)
            else:
                side = halved(name, side, len(part.channels) - 1)
        return self

    @property
    def stages(self) -> tuple[Optimisation, ...]:
        """All that is trained here, in order."""
        encoders = () if self.encoder is None else self.encoder.rounds
        first = [stage for stage in (self.autoencoder, self.teacher) if isinstance(stage, Optimisation)]
        return (*first, self.stage1, *self.stage2.rounds, *encoders)

    @property
    def exported_encoders(self) -> tuple[int, ...]:
        """The steps of the encoders that go into the bundle: each goes with the student of as many steps."""
        trained = () if self.encoder is None else self.encoder.rounds
        return tuple(round_.steps for round_ in trained if round_.steps in self.export.steps)

    @model_validator(mode="after")
    def exported_students_are_trained(self) -> Self:
        """Only students that stage 2 makes can be exported."""
        trained = {round_.steps for round_ in self.stage2.rounds}
        if missing := sorted(set(self.export.steps) - trained):
            raise ValueError(f"export.steps asks for {missing}, stage2 trains {sorted(trained)}")
        if len(set(self.export.steps)) != len(self.export.steps):
            raise ValueError("export.steps names a student twice")
        return self

    def portable_json(self, *, exclude_defaults: bool = False) -> str:
        """The recipe as JSON without where data and teacher lie, which may differ from machine to machine."""
        return self.model_dump_json(
            exclude={
                "data": {"path", "address", "autoencoder"},
                "teacher": {"checkpoint", "unconditional", "variant", "unconditional_variant"},
            },
            exclude_defaults=exclude_defaults,
        )

    def differences(self, record: dict[str, Any]) -> list[str]:
        """The parts that differ from an earlier `portable_json`, which may lack settings that are newer than it."""
        ours, given = (json.loads(self.portable_json(exclude_defaults=only)) for only in (False, True))
        names = ours.keys() | record.keys()
        return sorted(name for name in names if not _agree(ours.get(name), record.get(name), given.get(name)))

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Read a TOML file. Raises RecipeError with the file's name and each faulty field."""
        try:
            return cls.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        except ValidationError as error:
            raise RecipeError(f"{path}: {'; '.join(map(problem_of, error.errors()))}") from error
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise RecipeError(f"{path}: {error}") from error
