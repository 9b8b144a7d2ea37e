"""A bundle of the small Stable Diffusion with random weights, to see what a heavier one pays. Not for looks.

Its students of 4, 2 and 1 steps have learned nothing, and are exported as any others.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click
from accelerate import Accelerator

from benchmarks.small_pipeline import SIZE, make_checkpoint, write_images
from training.exporting.export import export
from training.exporting.graphs import SMALLEST_FIRST
from training.networks import student_from
from training.recipe import Recipe
from training.run import Run
from training.stages import student_stage

STEPS = (4, 2, 1)
IMAGES = 16


def recipe_of(checkpoint: Path, images: Path) -> Recipe:
    """Its stages would take an update each, and are not trained."""
    short: dict[str, Any] = {"updates": 1, "batch_size": 1, "learning_rate": 1e-6}
    return Recipe.model_validate(
        {
            "name": "small",
            "conditioning": "text",
            "data": {"source": "stream", "address": str(images), "size": SIZE},
            "teacher": {"checkpoint": str(checkpoint)},
            "stage1": short,
            "stage2": {"start": 2 * STEPS[0], "rounds": [{"steps": steps, **short} for steps in STEPS]},
            "export": {"title": "Random weights", "licence": "none", "steps": STEPS},
        }
    )


@click.command()
@click.argument("bundle", type=click.Path(exists=False, path_type=Path))
def main(bundle: Path) -> None:
    """Write BUNDLE, a folder that is not there yet. Takes a minute."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        recipe = recipe_of(make_checkpoint(folder / "teacher"), write_images(folder / "images", IMAGES, IMAGES, SIZE))
        run = Run(recipe, folder / "run", Accelerator(cpu=True))
        for steps in STEPS:
            stage = student_stage(steps)
            (run.folder / stage).mkdir()
            run.finish(stage, student_from(run.denoiser("teacher")))
        made = export(run, bundle, SMALLEST_FIRST)
    size = sum(record.size_bytes for record in made.manifest.files.values())
    click.echo(f"{bundle}: {size / 1e6:.1f} MB, {made.manifest.weights_dtype} weights")


if __name__ == "__main__":
    main()
