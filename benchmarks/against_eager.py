"""A bundle on ONNX Runtime against the same students step by step in eager torch, in turn in one process.

Both sides make whole images from prompts: text, steps, decoding. Every repeat has prompts of its own, as the bundle
keeps those that it has encoded. Medians over the repeats are printed, and the ratios of the pairs; the images are
compared, so that the two sides are known to do the same work.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import numpy as np
import onnxruntime
import torch
from torch import Tensor

from engines.pipeline import Generate, Pipeline, noise_of
from training.commands import Reported, open_finished_run
from training.pictures import to_uint8
from training.run import Run
from training.sampler import sample
from training.stages import student_stage
from training.text import load_text_encoder, load_tokenizer, tokenize

PROMPTS = ("dog", "red apple", "smiling face", "car")
WARMUP = 2


class Eager:
    """The students of a run in eager torch."""

    def __init__(self, run: Run, steps: int) -> None:
        self.run, self.steps = run, steps
        self.student = run.denoiser(student_stage(steps))
        self.text, self.tokenizer = load_text_encoder(), load_tokenizer(run.recipe.max_tokens)

    def __call__(self, tasks: list[Generate]) -> np.ndarray:
        noise = torch.from_numpy(np.stack([noise_of(task.seed, self.run.shape) for task in tasks]))
        w = torch.tensor([task.guidance for task in tasks])
        with torch.inference_mode():
            z = sample(self.student, self.run.schedule.grid(self.steps), noise, self._condition(tasks), w)
            return to_uint8(self.run.decoded(z))

    def _condition(self, tasks: list[Generate]) -> dict[str, Tensor]:
        if self.run.recipe.conditioning == "class":
            places = torch.tensor([self.run.data.classes.index(task.condition) for task in tasks])
            return {"label": self.run.class_numbers[places]}
        (context,) = self.text(*tokenize(self.tokenizer, [task.condition for task in tasks]))
        return {"context": context}


Make = Callable[[list[Generate]], object]


def in_turn(a: Make, b: Make, repeats: Sequence[list[Generate]]) -> tuple[list[float], list[float]]:
    """Seconds of each call of a and of b, called in turn for each repeat after those that warm up."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for repeat, tasks in enumerate(repeats):
        for side, make in enumerate((a, b)):
            start = time.perf_counter()
            make(tasks)
            if repeat >= WARMUP:
                seconds[side].append(time.perf_counter() - start)
    return seconds


def conditions(run: Run, count: int, repeat: int) -> list[str]:
    """Classes of the run's, or prompts that no other repeat has."""
    named = run.data.classes or [f"{prompt} {repeat}" for prompt in PROMPTS]
    return [named[i % len(named)] for i in range(count)]


@click.command(cls=Reported)
@click.argument("recipe", type=click.Path(exists=True, path_type=Path))
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--run", "folder", type=click.Path(exists=True, path_type=Path), help="The run's folder.")
@click.option("--data", type=click.Path(exists=True, path_type=Path), help="The image set.")
@click.option("--steps", default=4, show_default=True)
@click.option("--threads", default=2, show_default=True, help="Threads of each side.")
@click.option("--repeats", default=15, show_default=True)
def main(
    recipe: Path, bundle: Path, folder: Path | None, data: Path | None, steps: int, threads: int, repeats: int
) -> None:
    """Time BUNDLE against the students of RECIPE's run."""
    torch.set_num_threads(threads)
    run = open_finished_run(recipe, folder, data)
    eager = Eager(run, steps)
    versions = f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}"
    click.echo(f"{platform.machine()}, {threads} threads, {versions}, {steps} steps, median of {repeats}\n")
    click.echo("| images at once | eager torch, s | bundle, s | bundle, images/s | eager / bundle | furthest apart |")
    click.echo("|---|---|---|---|---|---|")
    with Pipeline.open(bundle, threads=threads) as pipeline:
        w = pipeline.manifest.guidance.default
        for count in (1, 16):
            tasks = [
                [Generate(condition, steps, w, seed=i) for i, condition in enumerate(conditions(run, count, repeat))]
                for repeat in range(WARMUP + repeats)
            ]
            theirs, ours = in_turn(eager, pipeline.run, tasks)
            ratio = statistics.median(a / b for a, b in zip(theirs, ours, strict=True))
            apart = np.abs(np.stack(pipeline.run(tasks[0])).astype(int) - eager(tasks[0])).max()
            seconds = statistics.median(theirs), statistics.median(ours)
            rate = count / seconds[1]
            click.echo(f"| {count} | {seconds[0]:.3f} | {seconds[1]:.3f} | {rate:.1f} | {ratio:.2f} | {apart} of 255 |")


if __name__ == "__main__":
    main()
