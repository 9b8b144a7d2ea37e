"""Both stages against diffusers' own LCM distillation script, on the same networks and images, in turn.

The script is examples/consistency_distillation/train_lcm_distill_sd_wds.py of a clone of diffusers
(git clone https://github.com/huggingface/diffusers), at a version that the installed diffusers satisfies. It runs as it
is, as a process, and its updates are timed by its progress bar; ours run in the training loop. Startup counts on
neither side. It needs accelerate, transformers, braceexpand and torchvision. Where torchvision cannot be
imported, as its build for CUDA cannot beside a torch for the CPU, `benchmarks/stand_ins` has the five functions of it
that the script calls (resize, crop, to_tensor, normalize and the draw of a crop), by Pillow. It also needs a webdataset
before 0.2.96 (https://github.com/webdataset/webdataset/issues/384), which may lie in a folder of its own:
pip install --no-deps --target FOLDER webdataset==0.2.86, then --packages FOLDER.

An update of the script is a student forward and back, two calls of the teacher, one of the averaged student and the
averaging itself; it encodes images and prompts as they come, in a process that reads and this one. An update of ours,
in stage 1, is a student forward and back and two calls of the teacher, and in stage 2 the same with the student of the
round before. Ours are timed both with images and prompts encoded as they come and with those of `fewstep precompute`.

The script computes its teacher's calls under torch.autocast whatever --mixed_precision says: in bf16 on a CPU, fp16 on
a GPU. So in fp32 it runs twice: as it is, and with that autocast made one of fp32, from outside.
"""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import diffusers
import torch
from accelerate import Accelerator

from benchmarks.lcm_process import Example, torchvision_is_there
from benchmarks.small_pipeline import SIZE, make_checkpoint, write_images
from benchmarks.stages import Loss, frozen_student, stage1_loss, stage2_loss, time_updates
from training.commands import MIXED_PRECISION
from training.draws import Draws
from training.losses import Batch
from training.networks import NetworkDenoiser, student_from
from training.precompute import precompute
from training.recipe import Recipe
from training.run import Run

IMAGES, PER_SHARD = 256, 8  # shards so small that every few updates read new ones
AS_IT_IS, EQUAL = "LCM script, as it is", "LCM script, teacher in fp32 too"

Side = Callable[[int], list[float]]
"""Seconds of each of so many updates."""


@dataclass(frozen=True)
class Setting:
    """What is the same on both sides."""

    checkpoint: Path
    images: Path
    size: int
    batch_size: int
    precision: str
    threads: int

    def run(self, folder: Path, address: Path) -> Run:
        """A run on the shards at an address."""
        short: dict[str, Any] = {"updates": 1, "batch_size": self.batch_size, "learning_rate": 1e-6}
        recipe = Recipe.model_validate(
            {
                "name": "throughput",
                "precision": self.precision,
                "conditioning": "text",
                "data": {"source": "stream", "address": str(address), "size": self.size},
                "teacher": {"checkpoint": str(self.checkpoint)},
                "stage1": short,
                "stage2": {"start": 2, "rounds": [{"steps": 1, **short}]},
                "export": {"licence": "none", "steps": [1]},
            }
        )
        return Run(recipe, folder, Accelerator(mixed_precision=MIXED_PRECISION[self.precision]))


def sides(setting: Setting, script: Path, packages: Path | None, folder: Path) -> Iterator[tuple[str, Side]]:
    """What is compared: the script, then our stages on images and on tensors."""
    example = Example(
        script.absolute(), setting.checkpoint, setting.images, setting.size, setting.batch_size, setting.precision,
        setting.threads, packages,
    )  # fmt: skip
    yield AS_IT_IS, partial(example.seconds, full_precision=False)
    if setting.precision == "fp32":
        yield EQUAL, partial(example.seconds, full_precision=True)
    streamed = setting.run(folder / "streamed", setting.images)
    precompute(streamed, str(folder / "tensors"), PER_SHARD)
    precomputed = setting.run(folder / "precomputed", folder / "tensors")
    for run, how in ((streamed, "encoding as it goes"), (precomputed, "precomputed")):
        teacher = run.denoiser("teacher")
        yield f"stage 1, {how}", _ours(run, teacher, stage1_loss(teacher, run.null))
        yield f"stage 2, {how}", _ours(run, teacher, stage2_loss(frozen_student(teacher)))


def _ours(run: Run, teacher: NetworkDenoiser, loss: Loss) -> Side:
    data, batch_size, numbers = run.data, run.recipe.stage1.batch_size, count()
    order = data.order(batch_size, 0)

    def batches(update: int, draws: Draws) -> Batch:
        batch = data.batch(draws.of(order.at(update)), draws, run.device)
        data.prefetch(draws.of(order.at(update + 1)))
        return batch

    def side(updates: int) -> list[float]:
        folder = run.folder / f"timed-{id(loss)}-{next(numbers)}"
        return time_updates(student_from(teacher), loss, batches, batch_size, updates, folder, run.accelerator)

    return side


def in_turn(compared: dict[str, Side], rounds: int, updates: int) -> dict[str, list[float]]:
    """The median seconds of an update in each round of each side, which take turns: A B C, A B C."""
    seconds: dict[str, list[float]] = {name: [] for name in compared}
    for _ in range(rounds):
        for name, side in compared.items():
            seconds[name].append(statistics.median(side(updates)))
    return seconds


def ratios(ours: list[float], theirs: list[float]) -> str:
    """How many times as fast as theirs ours is: the median of the rounds, and their range."""
    found = [b / a for a, b in zip(ours, theirs, strict=True)]
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


def table(seconds: dict[str, list[float]], batch_size: int) -> str:
    """The Markdown table of in_turn's answer."""
    bases = [name for name in (AS_IT_IS, EQUAL) if name in seconds]
    lines = [
        "| | s / update | images/s | " + " | ".join(f"times the {name}" for name in bases) + " |",
        "|---|--:|--:|" + "--:|" * len(bases),
    ]
    for name, own in seconds.items():
        middle = statistics.median(own)
        against = " | ".join(ratios(own, seconds[base]) for base in bases)
        lines.append(f"| {name} | {middle:.3f} | {batch_size / middle:.2f} | {against} |")
    return "\n".join(lines)


def _circumstances(setting: Setting, example: Path, rounds: int, updates: int) -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    torchvision = "torchvision" if torchvision_is_there() else "a stand-in for torchvision"
    return (
        f"{device}, {setting.threads} threads, torch {torch.__version__}, diffusers {diffusers.__version__}, "
        f"{torchvision}; {example.name}; batches of {setting.batch_size} images of {setting.size} px, "
        f"{setting.precision}, no gradient checkpointing, one device; medians of {updates} updates in each of {rounds} "
        "rounds, in turn; in brackets the range over the rounds"
    )


@click.command()
@click.option("--example", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True)
@click.option("--packages", type=click.Path(exists=True, path_type=Path), help="Packages for EXAMPLE alone.")
@click.option("--checkpoint", type=click.Path(exists=True, path_type=Path), help="A Stable Diffusion in a folder.")
@click.option("--size", default=SIZE, show_default=True, help="Side of the images in pixels.")
@click.option("--batch-size", type=click.IntRange(1), default=4, show_default=True)
@click.option("--precision", type=click.Choice(list(MIXED_PRECISION)), default="fp32", show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Threads of each side.")
@click.option("--rounds", type=click.IntRange(1), default=4, show_default=True)
@click.option(
    "--updates", type=click.IntRange(1), default=12, show_default=True, help="Timed, of each side in a round."
)
def main(
    example: Path, packages: Path | None, checkpoint: Path | None, size: int, batch_size: int, precision: str,
    threads: int, rounds: int, updates: int,
) -> None:  # fmt: skip
    """Time both stages and the LCM script in EXAMPLE in turn."""
    torch.set_num_threads(threads)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        images = write_images(folder / "images", IMAGES, PER_SHARD, size)
        made = checkpoint or make_checkpoint(folder / "checkpoint")
        setting = Setting(made, images, size, batch_size, precision, threads)
        seconds = in_turn(dict(sides(setting, example, packages, folder)), rounds, updates)
        click.echo(_circumstances(setting, example, rounds, updates) + "\n")
        click.echo(table(seconds, batch_size))


if __name__ == "__main__":
    main()
