"""The command that prints the quality table of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
from click.core import ParameterSource

from training.candidates import Candidate, ImageMaker, trained_students
from training.commands import open_finished_run
from training.data.entries import DataError
from training.evaluate import Plan, save_picture
from training.evaluate import evaluate as measure
from training.evaluation_set import load_evaluation_set
from training.features import DEFAULT_EXTRACTOR, EXTRACTORS, FeatureError, open_extractor
from training.loop import TrainingError
from training.metrics import MetricError
from training.quality import to_csv, to_json, to_markdown
from training.recipe import RecipeError
from training.run import Run
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


@click.command()
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
    help="Steps of guided DDIM with the teacher. With the most of them it is what all others are compared with.",
)
@click.option(
    "--guidance",
    callback=_numbers(float, 0),
    help="Values of w, the guidance scale less one.  [default: those of 0,1,2,4 in the trained range, and its ends]",
)
@click.option(
    "--samples",
    type=click.IntRange(min=2),
    help="Images in every cell.  [default: as many as the split gives captions for, at most 500]",
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
    help="Principal components of the features in which the Frechet distance is taken.",
)
@click.option(
    "--picture-guidance", type=float, help="The w of the picture of samples.  [default: nearest to the recipe's]"
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Of the choice of captions, the noise, and the subsets of KID.",
)
def evaluate(
    recipe: Path,
    folder: Path | None,
    data: Path | None,
    steps: tuple[int, ...] | None,
    teacher_steps: tuple[int, ...],
    guidance: tuple[float, ...] | None,
    samples: int | None,
    split: str,
    features: str,
    frechet_dims: int,
    picture_guidance: float | None,
    seed: int,
) -> None:
    """Print the quality table of a run of RECIPE: its teacher and students against real images.

    The table, its picture and all that they are made of are kept in the run's folder under evaluation/. What was
    measured before is not measured again, and an evaluation that was stopped goes on where it was.
    """
    try:
        run = open_finished_run(recipe, folder, data)
        plan = Plan(_candidates(run, steps, teacher_steps), _within_range(run, guidance), frechet_dims)
        picture_w = _picture_guidance(plan, run.recipe.default_guidance, picture_guidance)
        maker = ImageMaker(
            run,
            load_evaluation_set(run, split, samples, seed),
            seed,
            Store(run.folder / "evaluation"),
        )
        quality = measure(maker, open_extractor(features, run.device), plan)
    except (RecipeError, TrainingError, DataError, FeatureError, MetricError) as error:
        raise click.ClickException(str(error)) from error
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
    click.echo(reports["table.md"])


def _command(recipe: Path) -> str:
    """The command as it was given, less where its files lie."""
    context = click.get_current_context()
    words = ["fewstep evaluate", recipe.name]
    for option in context.command.params:
        value = context.params.get(option.name or "")
        given = context.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE
        if given and not isinstance(value, Path):
            words += [option.opts[0], ",".join(f"{v:g}" for v in value) if isinstance(value, tuple) else str(value)]
    return " ".join(words)


def _candidates(run: Run, steps: tuple[int, ...] | None, teacher_steps: tuple[int, ...]) -> tuple[Candidate, ...]:
    """The teacher with most steps first, then with fewer, then the students."""
    trained = trained_students(run)
    wanted = trained if steps is None else steps
    if missing := [n for n in wanted if n not in trained]:
        raise TrainingError(f"{run.folder} has no trained student of {missing[0]} steps; it has {_listed(trained)}")
    if not run.is_done("teacher"):
        raise TrainingError(f"{run.folder} has no trained teacher")
    return (
        *(Candidate("teacher", n) for n in sorted(teacher_steps, reverse=True)),
        *(Candidate("student", n) for n in sorted(wanted, reverse=True)),
    )


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
