"""The commands of a run: train, distill, export."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
import torch
from accelerate import Accelerator

from engines.bundle import BundleError
from training import distill as stages
from training import run as runs
from training.data.entries import DataError
from training.errors import Stopped, TrainingError
from training.evaluation.features import FeatureError
from training.evaluation.metrics import MetricError
from training.exporting.export import export as export_run
from training.exporting.graphs import SMALLEST_FIRST, ExportError, Weights
from training.lock import training_alone
from training.pretrained.pipeline_faults import TeacherError
from training.progress import Pace
from training.recipe import Recipe
from training.sections import RecipeError
from training.sharding import sharding

RECIPE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, path_type=Path)
AT_LEAST_ONE = click.IntRange(min=1)
STOPPED = 143  # as for a process that SIGTERM ended
MIXED_PRECISION = {"fp32": "no", "bf16": "bf16"}


class Finite(click.FloatRange):
    """A range that has no room for nan and inf."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number, within the range."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


SECONDS = Finite(min=0)

EXPECTED = (
    RecipeError, TrainingError, TeacherError, DataError, ExportError, BundleError, FeatureError, MetricError, OSError,
)  # fmt: skip


class Reported(click.Command):
    """A command whose expected errors are one line, not a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except EXPECTED as error:
            raise click.ClickException(str(error)) from error
        except Stopped as stopped:
            click.echo(str(stopped), err=True)
            ctx.exit(STOPPED)


def open_run(recipe: Path, out: Path | None, data: Path | None, pace: Pace = Pace()) -> runs.Run:
    """The run of a recipe in folder `out` (by default runs/NAME), its data path replaced by `data` if given.

    Raises RecipeError for a faulty recipe, TrainingError for a folder of another run.
    """
    loaded = Recipe.load(recipe)
    if data:
        loaded = loaded.model_copy(update={"data": loaded.data.at(data)})
    # Without this, accelerate takes several processes on a CPU for one each.
    on_cpu = not torch.accelerator.is_available()
    mixed_precision = MIXED_PRECISION[loaded.precision]
    plugin = sharding(mixed_precision)
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=on_cpu, fsdp_plugin=plugin)
    return runs.Run(loaded, out or Path("runs") / loaded.name, accelerator, pace)


def open_finished_run(recipe: Path, folder: Path | None, data: Path | None) -> runs.Run:
    """The run in a folder that is there. Raises as `open_run` does, and TrainingError where no run was.

    Raises TrainingError too for another teacher from a checkpoint than the one that it was distilled from.
    """
    place = folder or Path("runs") / Recipe.load(recipe).name
    if not (place / runs.RECORD).is_file():
        raise TrainingError(f"there is no run in {place}; train one, or name its folder with --run")
    run = open_run(recipe, place, data)
    run.know_checkpoint()  # It may be another by now.
    return run


def _on_a_run(command: Callable[[runs.Run], bool]) -> click.Command:
    """A subcommand RECIPE [options] out of a function of a run, which answers whether anything was left to do.

    One run at a time trains in a folder: of several processes that share one, the main process sees to it.
    """

    def opened(sample_every: int, checkpoint_every: float, **options: Any) -> None:
        pace = Pace(sample_every=sample_every, checkpoint_every_s=checkpoint_every)
        run = open_run(**options, pace=pace)
        is_main = run.accelerator.is_main_process
        with training_alone(run.folder) if is_main else nullcontext():
            was_left = command(run)
        if is_main and not was_left:
            click.echo(f"{run.folder}: nothing is left to do, every stage of `{command.__name__}` is done")

    parameters: list[click.Parameter] = [
        click.Argument(["recipe"], type=RECIPE),
        click.Option(["--out"], type=click.Path(path_type=Path), help="The run's folder.  [default: runs/NAME]"),
        click.Option(["--data"], type=FOLDER, help="The image set, instead of the recipe's path."),
        click.Option(
            ["--checkpoint-every"], type=SECONDS, default=120.0, show_default=True, help="Seconds between checkpoints."
        ),
        click.Option(
            ["--sample-every"], type=AT_LEAST_ONE, default=500, show_default=True, help="Updates between pictures."
        ),
    ]
    return Reported(command.__name__, callback=opened, params=parameters, help=command.__doc__)


@_on_a_run
def train(run: runs.Run) -> bool:
    """Train the guided teacher of RECIPE, and its autoencoder first if it has one. Resumes a run that was stopped."""
    return stages.train_teacher(run)


@_on_a_run
def distill(run: runs.Run) -> bool:
    """Distil the students of RECIPE, in fewer and fewer steps. What is missing before is trained first.

    Resumes a run that was stopped: finished stages are kept.
    """
    return stages.distill(run)


@click.command(cls=Reported)
@click.argument("recipe", type=RECIPE)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--run",
    "folder",
    type=click.Path(exists=True, path_type=Path),
    help="The run's folder.  [default: runs/NAME]",
)
@click.option(
    "--data",
    type=click.Path(exists=True, path_type=Path),
    help="The image set, instead of the recipe's path.",
)
@click.option(
    "--weights",
    type=click.Choice(["auto", *SMALLEST_FIRST]),
    default="auto",
    show_default=True,
    help="How weights are stored; auto takes the smallest that stays within tolerance.",
)
@click.option("--replace", is_flag=True, help="Replace a bundle that is there.")
@click.option(
    "--programs",
    is_flag=True,
    help="Write every graph as a torch program too, for the backends of PyTorch. Needs memory for its weights twice.",
)
def export(
    recipe: Path,
    bundle: Path,
    folder: Path | None,
    data: Path | None,
    weights: Weights | str,
    replace: bool,
    programs: bool,
) -> None:
    """Write the students of a finished run of RECIPE as BUNDLE, every graph checked against torch."""
    choice = SMALLEST_FIRST if weights == "auto" else tuple(w for w in SMALLEST_FIRST if w == weights)
    made = export_run(open_finished_run(recipe, folder, data), bundle, choice, replace, programs)
    size = sum(record.size_bytes for record in made.manifest.files.values())
    click.echo(
        f"{bundle}: revision {made.manifest.revision}, {size / 1e6:.1f} MB, {made.manifest.weights_dtype} weights"
    )
