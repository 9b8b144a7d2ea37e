"""Tiny untrained runs to evaluate: of digits by class, and of drawn squares by caption."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from click.testing import CliRunner, Result
from PIL import Image
from torch import Tensor

from training import run as runs
from training.evaluation.command import evaluate as command
from training.networks import NetworkDenoiser, build_autoencoder, build_unet, student_from
from training.prompts import TextGraph
from training.recipe import Recipe
from training.run import Run
from training.stages import student_stage

SIZE = 8
RECIPE = """
name = "tiny"
conditioning = "class"
data = { source = "digits", size = 8 }
network = { channels = [8], norm_groups = 4 }
teacher = { updates = 1, learning_rate = 1e-3 }
stage1 = { updates = 1, learning_rate = 1e-3 }
export = { licence = "CC-BY-4.0", steps = [4, 2] }

[stage2]
start = 8
rounds = [
    { steps = 4, updates = 1, learning_rate = 1e-3 },
    { steps = 2, updates = 1, learning_rate = 1e-3 },
    { steps = 1, updates = 1, learning_rate = 1e-3 },
]
"""
AUTOENCODER = """
[autoencoder]
channels = [4, 4]
latent_channels = 2
norm_groups = 2
updates = 1
learning_rate = 1e-3
"""


def keep(run: Run, stage: str, model: Any) -> None:
    (run.folder / stage).mkdir(parents=True)
    run.finish(stage, model)


def make_digits_run(folder: Path, recipe: str = RECIPE) -> Path:
    """The folder, with the recipe and its run: an untrained teacher, and students of 4 and 2 steps that equal it."""
    (folder / "tiny.toml").write_text(recipe)
    run = Run(Recipe.load(folder / "tiny.toml"), folder / "run", Accelerator(cpu=True))
    torch.manual_seed(0)
    assert run.recipe.network is not None
    teacher = NetworkDenoiser(build_unet(run.recipe.network, (3, SIZE, SIZE), None, 10), run.schedule)
    keep(run, "teacher", teacher)
    for steps in (4, 2):
        keep(run, student_stage(steps), student_from(teacher))
    return folder


def make_captioned_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, images: int = 40, students: Sequence[int] = (4,)
) -> Path:
    """The same for captions, with an autoencoder and few students; captions are encoded without a network."""
    monkeypatch.setattr(runs, "MiniLMPrompts", Prompts)
    write_squares(folder / "set", images)
    text = RECIPE.replace('"class"', '"text"').replace('source = "digits"', f'path = "{folder / "set"}"') + AUTOENCODER
    (folder / "tiny.toml").write_text(text)
    run = Run(Recipe.load(folder / "tiny.toml"), folder / "run", Accelerator(cpu=True))
    assert run.recipe.autoencoder is not None
    assert run.recipe.network is not None
    torch.manual_seed(0)
    keep(run, "autoencoder", build_autoencoder(run.recipe.autoencoder, SIZE))
    teacher = NetworkDenoiser(build_unet(run.recipe.network, (2, 4, 4), 6, 0), run.schedule)
    keep(run, "teacher", teacher)
    for steps in students:
        keep(run, student_stage(steps), student_from(teacher))
    return folder


def invoke(folder: Path, *options: str) -> Result:
    """`fewstep evaluate` of the folder's run."""
    return CliRunner().invoke(command, [str(folder / "tiny.toml"), "--run", str(folder / "run"), *options])


class Prompts:
    """A prompt encoder without a network: noise of six channels that depends on the caption."""

    def __init__(self, max_tokens: int, device: torch.device) -> None:
        self.max_tokens = max_tokens
        self.identity = f"noise, {max_tokens} tokens"

    @property
    def null(self) -> dict[str, Tensor]:
        return {"context": self.encode([""])["context"][0]}

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        generators = [torch.Generator().manual_seed(sum(caption.encode())) for caption in captions]
        return {"context": torch.stack([torch.randn(self.max_tokens, 6, generator=g) for g in generators])}

    def too_long(self, captions: Sequence[str]) -> int:
        return 0

    def release(self) -> None:
        pass

    def text_graph(self) -> TextGraph:
        raise ValueError("there is no network to export")


def write_squares(path: Path, count: int) -> None:
    """Squares of two colours as an imagefolder."""
    (path / "train").mkdir(parents=True)
    lines = []
    for i in range(count):
        colour = ("red", "blue")[i % 2]
        picture = Image.new("RGB", (SIZE, SIZE), "white")
        picture.paste(colour, (i % 4, i % 3, 4 + i % 5, 5 + i % 3))
        picture.save(path / "train" / f"{i}.png")
        lines.append(
            json.dumps({"file_name": f"{i}.png", "texts": [f"a {colour} square", f"a {colour} square, drawn"]})
        )
    (path / "train" / "metadata.jsonl").write_text("\n".join(lines))
