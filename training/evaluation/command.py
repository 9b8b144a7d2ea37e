"""The command that prints the quality table of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from training.commands import Reported, open_finished_run
from training.errors import TrainingError
from training.evaluation.candidates import Candidate, ImageMaker, trained_students
from training.evaluation.clip_score import ClipScorer
from training.evaluation.evaluate import Plan, save_picture
from training.evaluation.evaluate import evaluate as measure
from training.evaluation.evaluation_set import load_evaluation_set
from training.evaluation.features import DEFAULT_EXTRACTOR, EXTRACTORS, open_extractor
from training.evaluation.inception import Inception
from training.evaluation.plots import save_plots
from training.evaluation.tables import SOUND_IMAGES, to_csv, to_json, to_markdown
from training.run import Run
from training.solvers import SOLVERS, Solver
from training.stages import TEACHER
from training.store import Store, whole_file


def _numbers(kind: type[int] | type[float], least: int) -> Callable[..., tuple[float, ...] | None]:
    """Reads an option's numbers between commas, none below `least`; one that is repeated counts once."""

    def read(context: click.Context, option: click.Parameter, value: str | None) -> tuple[float, ...] | None:
        if value is None:
            return None
        try:
            numbers = tuple(dict.fromkeys(kind(part) for part in value.split(",")))
        except ValueError:
            raise click.BadParameter(f"{value!r} is not a list of numbers such as 4,2,1") from None
        if not all(least <= number < float("inf") for number in numbers):
            raise click.BadParameter(f"{value!r} has a number that is not at least {least}, and finite")
        return numbers

    return read


def _solvers(context: click.Context, option: click.Parameter, value: str) -> tuple[Solver, ...]:
    """The solvers that are named between commas, in the order of `SOLVERS`."""
    names = value.split(",")
    if unknown := [name for name in names if name not in SOLVERS]:
        raise click.BadParameter(f"{unknown[0]!r} is not one of {', '.join(SOLVERS)}")
    return tuple(solver for solver in SOLVERS if solver in names)


@click.command(cls=Reported)
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--run", "folder", type=click.Path(path_type=Path), help="The run's folder.  [default: runs/NAME]")
@click.option(
    "--data", type=click.Path(exists=True, path_type=Path), help="The image set, instead of the recipe's path."
)
@click.option(
    "--steps", callback=_numbers(int, 1), help="Steps of the students.  [default: those of every student in the run]"
)
@click.option(
    "--teacher-steps",
    callback=_numbers(int, 1),
    default="50,4,2,1",
    show_default=True,
    help="Steps of the guided teacher. With the most of them, by DDIM, it is what all others are compared with.",
)
@click.option(
    "--solvers",
    callback=_solvers,
    default=",".join(SOLVERS),
    show_default=True,
    help="What the teacher is sampled with at fewer steps than the most.",
)
@click.option(
    "--guidance",
    callback=_numbers(float, 0),
    help="Values of w, the guidance scale less one.  [default: those of 0,1,2,4 in the trained range, and its ends]",
)
@click.option(
    "--images",
    type=click.Path(exists=True, path_type=Path),
    help="An image set to compare with, instead of the recipe's: for recipes that stream theirs.",
)
@click.option(
    "--samples",
    type=click.IntRange(min=2),
    default=SOUND_IMAGES,
    show_default=True,
    help="Images in every cell. With more than the split gives captions for, these are used again. Fewer are "
    "quicker, but then only the rows of the table can be compared.",
)
@click.option(
    "--split",
    default="train",
    show_default=True,
    help="Where captions come from. Train is halved: captions from one half, the other is the reference. "
    "For any other split the reference is train.",
)
@click.option(
    "--features",
    type=click.Choice(list(EXTRACTORS)),
    default=DEFAULT_EXTRACTOR,
    show_default=True,
    help="What images are compared by.",
)
@click.option(
    "--frechet-dims",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Principal components of the features in which the Frechet distance, precision and recall are taken.",
)
@click.option(
    "--inception",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Measure FID and Inception Score too, with the published weights-inception-2015-12-05-6726825d.pth at PATH.",
)
@click.option(
    "--clip",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Measure the CLIP score too, with the transformers folder of a CLIP model at PATH. For captions only.",
)
@click.option(
    "--picture-guidance", type=float, help="The w of the picture of samples.  [default: nearest to the recipe's]"
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Seed of the choice of captions, the noise, and the subsets of KID.",
)
def evaluate(
    recipe: Path,
    folder: Path | None,
    data: Path | None,
    steps: tuple[int, ...] | None,
    teacher_steps: tuple[int, ...],
    solvers: tuple[Solver, ...],
    guidance: tuple[float, ...] | None,
    images: Path | None,
    samples: int,
    split: str,
    features: str,
    frechet_dims: int,
    inception: Path | None,
    clip: Path | None,
    picture_guidance: float | None,
    seed: int,
) -> None:
    """Print the quality table of a run of RECIPE: its teacher and students against real images.

    The table, its plots, its picture and all that they are made of are kept in the run's folder under evaluation/.
    What was measured before is not measured again, and an evaluation that was stopped goes on where it was.
    """
    _require_rows(solvers, teacher_steps)
    run = open_finished_run(recipe, folder, data)
    plan = Plan(_candidates(run, steps, teacher_steps, solvers), _within_range(run, guidance), frechet_dims)
    picture_w = _picture_guidance(plan, run.recipe.default_guidance, picture_guidance)
    device = run.device
    scorer = _clip_scorer(run, clip)
    network = None if inception is None else Inception(inception, device)
    maker = ImageMaker(
        run,
        load_evaluation_set(run, split, samples, seed, images),
        seed,
        Store(run.folder / "evaluation"),
    )
    quality = measure(maker, open_extractor(features, device), plan, network, scorer)
    folder = run.folder / "evaluation"
    legend = save_picture(maker, plan, picture_w, folder / "samples.png")
    reports = {
        "table.md": f"{to_markdown(quality)}\nSamples: {legend}\n\nPrinted by `{_command(recipe)}`.\n",
        "table.csv": to_csv(quality),
        "table.json": to_json(quality),
    }
    for name, text in reports.items():
        with whole_file(folder / name) as partial:
            partial.write_text(text)
    save_plots(quality, folder)
    click.echo(reports["table.md"])


def _require_rows(solvers: tuple[Solver, ...], teacher_steps: tuple[int, ...]) -> None:
    """Raises click's BadParameter for a solver that was asked for and has no row: it would take fewer steps."""
    context = click.get_current_context()
    given = context.get_parameter_source("solvers") is ParameterSource.COMMANDLINE
    if given and len(teacher_steps) == 1 and (rest := [name for name in solvers if name != "ddim"]):
        raise click.BadParameter(
            f"{rest[0]} samples the teacher at fewer steps than the most, and --teacher-steps names "
            f"{teacher_steps[0]} alone",
            param_hint="--solvers",
        )


def _command(recipe: Path) -> str:
    """The command as it was given, less where its files lie."""
    context = click.get_current_context()
    words = ["fewstep evaluate", recipe.name]
    for option in context.command.params:
        value = context.params.get(option.name or "")
        given = context.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE
        if given and option.name not in ("recipe", "folder", "data"):
            words += [option.opts[0], _as_given(value)]
    return " ".join(words)


def _as_given(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(part if isinstance(part, str) else f"{part:g}" for part in value)
    return value.name if isinstance(value, Path) else str(value)


def _clip_scorer(run: Run, folder: Path | None) -> ClipScorer | None:
    if folder is None:
        return None
    if run.recipe.conditioning != "text":
        raise TrainingError("--clip compares images with captions, and this recipe's conditions are classes")
    return ClipScorer(folder, run.accelerator.device)


def _candidates(
    run: Run, steps: tuple[int, ...] | None, teacher_steps: tuple[int, ...], solvers: tuple[Solver, ...]
) -> tuple[Candidate, ...]:
    """The teacher's DDIM with most steps first, then its solvers one by one with fewer, then the students."""
    trained = trained_students(run)
    wanted = trained if steps is None else steps
    if missing := [n for n in wanted if n not in trained]:
        raise TrainingError(f"{run.folder} has no trained student of {missing[0]} steps; it has {_listed(trained)}")
    if not run.is_done(TEACHER):
        raise TrainingError(f"{run.folder} has no trained teacher")
    if max(teacher_steps) > run.schedule.timesteps:
        raise TrainingError(f"{max(teacher_steps)} steps cannot be taken on {run.schedule.timesteps} timesteps")
    most, *fewer = sorted(teacher_steps, reverse=True)
    return (
        Candidate("teacher", most),
        *(Candidate("teacher", n, sampler) for sampler in solvers for n in fewer),
        *(Candidate("student", n) for n in sorted(wanted, reverse=True)),
        *(Candidate("student", 2 * n, "stochastic") for n in _stochastic(run) if n in wanted),
    )


def _stochastic(run: Run) -> list[int]:
    return sorted((round_.steps for round_ in run.recipe.stage2.rounds if round_.stochastic), reverse=True)


def _within_range(run: Run, guidance: tuple[float, ...] | None) -> tuple[float, ...]:
    low, high = run.recipe.guidance
    if guidance is None:
        return tuple(sorted({low, high} | {w for w in (0.0, 1.0, 2.0, 4.0) if low <= w <= high}))
    if outside := [w for w in guidance if not low <= w <= high]:
        raise TrainingError(f"w = {outside[0]:g} is outside the students' trained range, {low:g} to {high:g}")
    return guidance


def _picture_guidance(plan: Plan, default: float, wanted: float | None) -> float:
    if wanted is None:
        return min(plan.guidance, key=lambda w: abs(w - default))
    if wanted not in plan.guidance:
        raise TrainingError(f"--picture-guidance {wanted:g} is not among the values of w, {_listed(plan.guidance)}")
    return wanted


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values) or "none"
