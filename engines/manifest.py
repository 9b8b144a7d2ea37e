"""The manifest: what a bundle says of itself. Pure data and its laws; knows nothing of files on disk."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from engines.backends.base import BATCH, GridPlace, TensorSpec

FORMAT_VERSION: Literal[1] = 1
MANIFEST_NAME = "manifest.json"
CONTEXT = "context"
IDS, SECOND_IDS = "input_ids", "input_ids_2"
ATTENTION_MASK = "attention_mask"
LABEL = "label"
MASK, MASKED = "mask", "masked"

Sampler = Literal["deterministic", "stochastic"]
"""DDIM's steps, or the paper's sampler that goes two places of its grid at a step and one back, by noise."""

SAMPLERS: tuple[Sampler, ...] = get_args(Sampler)

WEIGHT_BITS: dict[str, int] = {
    **{"fp32": 32, "float32": 32, "fp16": 16, "float16": 16, "bf16": 16, "bfloat16": 16},
    **{"fp8": 8, "float8_e4m3fn": 8, "float8_e5m2": 8, "int8": 8, "uint8": 8, "fp4": 4, "int4": 4, "uint4": 4},
}
"""What a weight may be stored as, and how wide that is."""

_SCALE_DIGITS = 9
_NAME = re.compile(r"\w[\w .-]{0,99}")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def plain_name(name: str) -> str:
    """The name itself; ValueError where it could not be written in a path of a URL, or as name@revision."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a name of at most 100 letters, digits, spaces, '.', '_' and '-'")
    return name


def plain_file_name(name: str) -> str:
    """The name itself; ValueError where it could lead out of the bundle's folder or hide in it."""
    if not _FILE_NAME.fullmatch(name) or name == MANIFEST_NAME:
        raise ValueError(f"{name!r} is not a plain file name inside the bundle")
    return name


def known_storages(names: str) -> str:
    """The names themselves, joined by +; ValueError for one that is not in `WEIGHT_BITS`."""
    if unknown := [name for name in names.split("+") if name not in WEIGHT_BITS]:
        raise ValueError(f"{unknown[0]!r} is not a storage of weights; known: {', '.join(WEIGHT_BITS)}")
    return names


FileName = Annotated[str, AfterValidator(plain_file_name)]
Storages = Annotated[str, AfterValidator(known_storages)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Size = Annotated[int, Field(ge=1, le=2**16)]
Guidance = Annotated[float, Field(ge=0, le=1e6)]  # far within what the networks' float32 can square
TokenId = Annotated[int, Field(ge=0, lt=2**32)]  # as tokenizers have them
Licence = Annotated[str, Field(min_length=1)]
ImageShape = tuple[Literal[3], Size, Size]
LatentShape = tuple[Size, Size, Size]


class Model(BaseModel):
    """Base of every manifest model: frozen, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Grid(Model):
    """The N + 1 times of a student, from noise (t = 1) to clean (t = 0), with alpha and sigma for each."""

    times: tuple[Finite, ...]
    alphas: tuple[Finite, ...]
    sigmas: tuple[Finite, ...]

    @property
    def steps(self) -> int:
        """Number of network calls, N."""
        return len(self.times) - 1

    @property
    def places(self) -> tuple[GridPlace, ...]:
        """Time, alpha and sigma of each."""
        return tuple(zip(self.times, self.alphas, self.sigmas, strict=True))

    @model_validator(mode="after")
    def _laws(self) -> Self:
        if not len(self.times) == len(self.alphas) == len(self.sigmas) >= 2:
            raise ValueError("times, alphas and sigmas must have the same length, at least 2")
        if not all(late > early for late, early in pairwise(self.times)):
            raise ValueError("times must decrease")
        if not all(early <= late for early, late in pairwise(self.alphas)):
            raise ValueError("alphas must not decrease along the grid")
        if not all(early >= late for early, late in pairwise(self.sigmas)):
            raise ValueError("sigmas must not increase along the grid")
        if self.times[0] > 1 or min(self.alphas) < 0 or min(self.sigmas) < 0:
            raise ValueError("times lie in [0, 1]; alphas and sigmas are not negative")
        if self.alphas[1] == 0:
            raise ValueError("only the first place of a grid may be pure noise, of alpha 0")
        if (self.times[-1], self.alphas[-1], self.sigmas[-1]) != (0.0, 1.0, 0.0):
            raise ValueError("the grid must end clean: time 0, alpha 1, sigma 0")
        return self


class Student(Model):
    """One step graph and the grid it was trained on.

    ``stochastic`` is the grid of twice the steps, where the student was trained at its times too: the stochastic
    sampler calls it at all of them. ``encoder`` is a step graph that goes ``grid`` in reverse, from an image to its
    noise. A student may have neither.
    """

    steps: Size
    graph: FileName
    grid: Grid
    stochastic: Grid | None = None
    encoder: FileName | None = None

    @model_validator(mode="after")
    def _grids_fit(self) -> Self:
        if self.grid.steps != self.steps:
            raise ValueError(f"a student of {self.steps} steps has a grid of {self.grid.steps}")
        if self.stochastic is not None and self.stochastic.times[::2] != self.grid.times:
            raise ValueError("the stochastic sampler's grid halves every step of the student's")
        return self

    def grid_of(self, sampler: Sampler) -> Grid | None:
        """The grid on which a sampler calls the student, if it may."""
        return self.stochastic if sampler == "stochastic" else self.grid


class SecondTokens(Model):
    """How a graph of two text encoders has its second one read a prompt: another tokenizer, or another padding."""

    tokenizer: FileName
    pad_id: TokenId = 0


class TextEncoder(Model):
    """The text graph and the tokenizer in front of it; prompts are padded to ``max_tokens``."""

    graph: FileName
    tokenizer: FileName
    max_tokens: Size
    pad_id: TokenId = 0
    second: SecondTokens | None = None

    @property
    def tokenizers(self) -> tuple[FileName, ...]:
        """The files of its tokenizers; two encoders may share one."""
        return (self.tokenizer,) if self.second is None else (self.tokenizer, self.second.tokenizer)


class GuidanceRange(Model):
    """The range of w the students were trained on. w = 0 is no guidance."""

    minimum: Guidance
    maximum: Guidance
    default: Guidance

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.minimum <= self.default <= self.maximum:
            raise ValueError("guidance needs minimum <= default <= maximum")
        return self

    @property
    def scales(self) -> tuple[float, float, float]:
        """Minimum, maximum and default as clients have them: guidance_scale = 1 + w."""
        low, high, usual = (round(1 + w, _SCALE_DIGITS) for w in (self.minimum, self.maximum, self.default))
        return low, high, usual

    def w_of(self, scale: float) -> float:
        """The w of a guidance_scale, wherever it lies; of one in `scales`, w as it is in this range."""
        known = zip(self.scales, (self.minimum, self.maximum, self.default), strict=True)
        return next((w for shown, w in known if round(scale, _SCALE_DIGITS) == shown), scale - 1)


class Attribution(Model):
    """A work the bundle was made from; ``source`` is a URL or a package."""

    name: str
    licence: Licence
    source: str
    notice: str = ""


class Provenance(Model):
    """How the bundle came to be; ``created`` is an ISO 8601 time, ``quality_table`` is Markdown."""

    recipe: str
    data: str
    commit: str
    created: str
    quality_table: str = ""


class FileRecord(Model):
    """Digest and size of one file of the bundle."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    size_bytes: Annotated[int, Field(ge=0)]


class Description(Model):
    """A manifest without what `write_bundle` computes from the files: `files` and `revision`.

    Text bundles: the condition arrays are the outputs of the text graph, ``attention_mask`` where the step graphs want
    it, and where their networks see what is to be painted anew, ``mask`` and ``masked``. Class bundles: one ``label``
    of shape (batch,) and dtype int64, a class's place among ``classes``. ``programs`` are the same graphs as
    torch.export programs, by the file name of the graph; there may be none. ``weights_dtype`` names every storage of
    weights that its graphs have, joined by +.
    """

    format_version: Literal[1] = FORMAT_VERSION
    name: Annotated[str, AfterValidator(plain_name)]
    space: Literal["pixel", "latent"]
    conditioning: Literal["text", "class"]
    image_shape: ImageShape
    latent_shape: LatentShape
    students: Annotated[tuple[Student, ...], Field(min_length=1)]
    guidance: GuidanceRange
    condition: Annotated[tuple[TensorSpec, ...], Field(min_length=1)]
    text: TextEncoder | None = None
    classes: tuple[str, ...] = ()
    encode: FileName | None = None
    decode: FileName | None = None
    programs: dict[FileName, FileName] = {}
    weights_dtype: Storages
    licence: Licence
    attributions: tuple[Attribution, ...] = ()
    provenance: Provenance

    @model_validator(mode="after")
    def _space_fits(self) -> Self:
        latent = self.space == "latent"
        if latent != (self.encode is not None) or latent != (self.decode is not None):
            raise ValueError("latent bundles have encode and decode graphs, pixel bundles neither")
        if not latent and self.latent_shape != self.image_shape:
            raise ValueError("latent_shape of a pixel bundle must equal image_shape")
        if any(pixels % cells for pixels, cells in zip(self.image_shape[1:], self.latent_shape[1:], strict=True)):
            raise ValueError(f"latent {self.latent_shape} does not divide image {self.image_shape}")
        return self

    @model_validator(mode="after")
    def _conditioning_fits(self) -> Self:
        specs = {spec.name: spec for spec in self.condition}
        only_first = all(
            spec.shape[:1] == (BATCH,) and all(isinstance(dim, int) for dim in spec.shape[1:])
            for spec in self.condition
        )
        if len(specs) != len(self.condition) or not only_first:
            raise ValueError(
                "condition arrays need different names, a first dimension 'batch' and the others as numbers"
            )
        if self.conditioning == "class":
            if self.text is not None or not self.classes or len(set(self.classes)) != len(self.classes):
                raise ValueError("class bundles list their classes, each once, and have no text encoder")
            if self.condition != (TensorSpec(name=LABEL, dtype="int64", shape=(BATCH,)),):
                raise ValueError(f"class bundles have one condition array: {LABEL} int64(batch)")
        else:
            if self.text is None or self.classes or CONTEXT not in specs:
                raise ValueError(f"text bundles have a text encoder, a condition {CONTEXT!r}, and no classes")
            mask = TensorSpec(name=ATTENTION_MASK, dtype="int64", shape=(BATCH, self.text.max_tokens))
            if specs.get(ATTENTION_MASK, mask) != mask:
                raise ValueError(f"{ATTENTION_MASK} must be {mask}")
        return self

    @model_validator(mode="after")
    def _masks_fit(self) -> Self:
        seen = {spec for spec in self.condition if spec.name in (MASK, MASKED)}
        channels, *sides = self.latent_shape
        whole = {
            TensorSpec(name=MASK, dtype="float32", shape=(BATCH, 1, *sides)),
            TensorSpec(name=MASKED, dtype="float32", shape=(BATCH, channels, *sides)),
        }
        if seen and (seen != whole or self.space != "latent"):
            raise ValueError(
                f"networks that see masks work in a latent space, and take {MASK} and {MASKED} of its size"
            )
        return self

    @model_validator(mode="after")
    def _students_differ(self) -> Self:
        if len({student.steps for student in self.students}) != len(self.students):
            raise ValueError("two students have the same number of steps")
        return self

    @model_validator(mode="after")
    def _roles_differ(self) -> Self:
        graphs = [*dict.fromkeys(self.step_graphs()), *self._other_graphs()]  # students may share theirs
        if shared := [name for name in graphs if graphs.count(name) > 1]:
            raise ValueError(f"{shared[0]} is a graph of two kinds")
        return self

    @model_validator(mode="after")
    def _programs_fit(self) -> Self:
        if unknown := sorted(self.programs.keys() - set(self.graph_names())):
            raise ValueError(f"programs of no graph: {', '.join(unknown)}")
        files = list(self.named_files())
        if any(files.count(name) > 1 for name in self.programs.values()):
            raise ValueError("every program is a file of its own")
        return self

    @property
    def sees_masks(self) -> bool:
        """Whether its networks see what is to be painted anew, and what is left of the image."""
        return any(spec.name == MASK for spec in self.condition)

    @property
    def encoded(self) -> tuple[TensorSpec, ...]:
        """The condition arrays that the text graph gives."""
        return tuple(spec for spec in self.condition if spec.name not in (ATTENTION_MASK, MASK, MASKED))

    def find_student(self, steps: int, sampler: Sampler = "deterministic") -> Student | None:
        """The student that makes images in so many calls with a sampler, if there is one."""
        for student in self.students:
            grid = student.grid_of(sampler)
            if grid is not None and grid.steps == steps:
                return student
        return None

    def trained_steps(self, sampler: Sampler = "deterministic") -> tuple[int, ...]:
        """The numbers of calls in which a sampler can make an image, in order."""
        grids = (student.grid_of(sampler) for student in self.students)
        return tuple(sorted(grid.steps for grid in grids if grid is not None))

    def encoded_steps(self) -> tuple[int, ...]:
        """The steps of the students that have an encoder, in order."""
        return tuple(sorted(student.steps for student in self.students if student.encoder is not None))

    def step_graphs(self) -> Iterator[str]:
        """The graphs of the students and of their encoders, by file name."""
        for student in self.students:
            yield from (name for name in (student.graph, student.encoder) if name is not None)

    def graph_names(self) -> Iterator[str]:
        """Every graph, by file name."""
        yield from self.step_graphs()
        yield from self._other_graphs()

    def _other_graphs(self) -> Iterator[str]:
        if self.text is not None:
            yield self.text.graph
        yield from (name for name in (self.encode, self.decode) if name is not None)

    def named_files(self) -> Iterator[str]:
        """Every file the description refers to (README, external weights and the like may come on top)."""
        yield from self.graph_names()
        if self.text is not None:
            yield from dict.fromkeys(self.text.tokenizers)
        yield from self.programs.values()


class Manifest(Description):
    """What `manifest.json` holds: the description, every file's record, and the revision that seals both."""

    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]
    files: dict[FileName, FileRecord]

    @property
    def model(self) -> str:
        """The name of this very bundle, ``name@revision``."""
        return f"{self.name}@{self.revision}"

    def answers_to(self, name: str) -> bool:
        """Whether ``name`` is its name, or its ``name@revision``."""
        return name in (self.name, self.model)

    @model_validator(mode="after")
    def _files_listed(self) -> Self:
        if missing := sorted(set(self.named_files()) - self.files.keys()):
            raise ValueError(f"files does not list {', '.join(missing)}")
        return self


def seal(document: Mapping[str, Any]) -> str:
    """The revision: 12 hex digits of SHA-256 over the JSON document without its own ``revision``.

    The document holds every file's digest, so the revision changes with any file and any field.
    """
    body = {key: value for key, value in document.items() if key != "revision"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
