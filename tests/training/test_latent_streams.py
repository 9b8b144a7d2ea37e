"""Latents of an autoencoder that is trained here: from a folder of images, through shards, to a student."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from click.testing import CliRunner, Result
from PIL import Image

import fewstep
from training.data.place import StreamError
from training.data.shard_contents import Contents
from training.data.shard_index import IndexedShard, MadeWith
from training.data.shard_writer import TensorShardWriter
from training.data.stream import ShardStream
from training.data.streamed import StreamedTensors, open_stream, require_fit
from training.diffusion import Schedule
from training.distill import Picture
from training.draws import Draws
from training.errors import TrainingError
from training.recipe import Recipe
from training.rounds import Trial
from training.run import Run
from training.sections import DataRecipe, RecipeError

RECIPE = """
name = "squares"
conditioning = "class"

[network]
channels = [8]
norm_groups = 4

[teacher]
updates = 2
batch_size = 4
learning_rate = 1e-3

[stage1]
updates = 2
batch_size = 4
learning_rate = 1e-3

[stage2]
start = 2
rounds = [{ steps = 1, updates = 2, batch_size = 4, learning_rate = 1e-3 }]

[export]
licence = "CC0-1.0"
steps = [1]
"""
AUTOENCODER = """
[autoencoder]
channels = [4, 4]
latent_channels = 2
norm_groups = 2
updates = 1
batch_size = 4
learning_rate = 1e-3
"""


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(fewstep.main, [str(argument) for argument in arguments])


def section_of(output: str) -> str:
    """The [data] section that the command printed."""
    return output[output.index("[data]") :]


@pytest.fixture(scope="module")
def precomputed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with images, the run of their recipe and its shards; and what the command printed."""
    root = tmp_path_factory.mktemp("latents")
    for k, name in enumerate(("cat", "dog")):
        (root / "images" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (8, 8), (60 * i, 80 * k, 100)).save(root / "images" / name / f"{i}.png")
    data = f"[data]\npath = {json.dumps(str(root / 'images'))}\nsize = 8\n"
    (root / "folder.toml").write_text(RECIPE + AUTOENCODER + data)
    made = invoke("precompute", root / "folder.toml", root / "shards", "--out", root / "run", "--per-shard", "3")
    assert made.exit_code == 0, made.output
    return root, made.output


def streaming(precomputed: tuple[Path, str], folder: Path, recipe: str = RECIPE) -> Path:
    """A recipe with the [data] that the command printed."""
    path = folder / "stream.toml"
    path.write_text(recipe + section_of(precomputed[1]))
    return path


def open_run(recipe: Path, folder: Path) -> Run:
    return Run(Recipe.load(recipe), folder, Accelerator(cpu=True))


def test_a_folder_becomes_latents_and_these_become_a_student(precomputed: tuple[Path, str], tmp_path: Path) -> None:
    recipe = streaming(precomputed, tmp_path)
    made = invoke("distill", recipe, "--out", tmp_path / "run")
    assert made.exit_code == 0, made.output
    ours, theirs = open_run(recipe, tmp_path / "run"), open_run(precomputed[0] / "folder.toml", precomputed[0] / "run")
    assert ours.is_done("student-1")
    assert ours.shape == (2, 4, 4)
    assert ours.weights("autoencoder") == theirs.weights("autoencoder")
    assert ours.autoencoder().config["scaling_factor"] == theirs.autoencoder().config["scaling_factor"]


def test_the_command_tells_the_section_of_the_recipe_that_streams(precomputed: tuple[Path, str]) -> None:
    root, output = precomputed
    assert tomllib.loads(section_of(output)) == {
        "data": {
            "source": "stream",
            "address": str(root / "shards"),
            "size": 8,
            "classes": ["cat", "dog"],
            "autoencoder": str(root / "run" / "autoencoder"),
        }
    }


def test_a_run_keeps_its_autoencoder_and_takes_no_other(precomputed: tuple[Path, str], tmp_path: Path) -> None:
    moved = tmp_path / "autoencoder"
    shutil.copytree(precomputed[0] / "run" / "autoencoder", moved)
    recipe = streaming(precomputed, tmp_path)
    recipe.write_text(recipe.read_text().replace(str(precomputed[0] / "run" / "autoencoder"), str(moved)))
    first = open_run(recipe, tmp_path / "run").weights("autoencoder")
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"scaling_factor": 2 * config["scaling_factor"]}))
    with pytest.raises(TrainingError, match="begun with another autoencoder"):
        open_run(recipe, tmp_path / "run")
    shutil.rmtree(moved)
    assert open_run(recipe, tmp_path / "run").weights("autoencoder") == first
    with pytest.raises(TrainingError, match="holds no trained autoencoder"):
        open_run(recipe, tmp_path / "other")


def test_an_autoencoder_is_not_trained_on_a_stream(precomputed: tuple[Path, str], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"precompute with that recipe, .* as data\.autoencoder"):
        Recipe.load(streaming(precomputed, tmp_path, RECIPE + AUTOENCODER))


def test_a_teacher_from_a_checkpoint_takes_no_other_autoencoder(precomputed: tuple[Path, str], tmp_path: Path) -> None:
    network, _, rest = RECIPE.partition("[network]")
    stages = rest[rest.index("[stage1]") :]
    with pytest.raises(RecipeError, match="brings its own autoencoder"):
        Recipe.load(streaming(precomputed, tmp_path, f'{network}[teacher]\ncheckpoint = "x"\n{stages}'))


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        ('["dog", "cat"]', "label 0 is cat there, and dog in"),
        ('["cat"]', "label 1 is dog there, and no class in"),
        ('["cat", "dog", "eel"]', "label 2 is no class there, and eel in"),
    ],
)
def test_classes_other_than_those_of_the_labels_are_refused(
    precomputed: tuple[Path, str], tmp_path: Path, classes: str, said: str
) -> None:
    recipe = streaming(precomputed, tmp_path)
    text = recipe.read_text()
    assert '["cat", "dog"]' in text
    recipe.write_text(text.replace('["cat", "dog"]', classes))
    with pytest.raises(StreamError, match=said):
        _ = open_run(recipe, tmp_path / "run").data


def test_latents_of_another_autoencoder_are_refused(precomputed: tuple[Path, str], tmp_path: Path) -> None:
    root = precomputed[0]
    (tmp_path / "folder.toml").write_text((root / "folder.toml").read_text().replace("squares", 'seeded"\nseed = 1 #'))
    made = invoke("precompute", tmp_path / "folder.toml", tmp_path / "shards", "--out", tmp_path / "other")
    assert made.exit_code == 0, made.output
    recipe = streaming(precomputed, tmp_path)
    recipe.write_text(recipe.read_text().replace(str(root / "shards"), str(tmp_path / "shards")))
    with pytest.raises(StreamError, match="made with another autoencoder"):
        _ = open_run(recipe, tmp_path / "run").data


def test_shards_that_do_not_say_their_origin_are_taken_and_told_to_be_unchecked(
    precomputed: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(precomputed[0] / "shards", tmp_path / "shards")
    file = tmp_path / "shards" / "index.json"
    index = json.loads(file.read_text())
    del index["made_with"]
    file.write_text(json.dumps(index))
    recipe = streaming(precomputed, tmp_path)
    recipe.write_text(recipe.read_text().replace(str(precomputed[0] / "shards"), str(tmp_path / "shards")))
    assert len(open_run(recipe, tmp_path / "run").data) == 8
    assert "does not say which autoencoder" in capsys.readouterr().out
    again = invoke(
        "precompute", precomputed[0] / "folder.toml", tmp_path / "shards", "--out", precomputed[0] / "run",
        "--per-shard", "3",
    )  # fmt: skip
    assert again.exit_code == 0, again.output
    assert json.loads(file.read_text()) == index


def labelled(folder: Path, labels: list[int], dtype: str) -> StreamedTensors:
    """Items with such labels of three classes, whose numbers are 5, 6 and 7."""
    with TensorShardWriter(str(folder), 4, "labels") as writer:
        for label in labels:
            writer.write({"x": np.zeros((3, 8, 8), np.float16), "label": np.array([label], dtype)})
    classes = ("ant", "bee", "cat")
    stream = open_stream(DataRecipe(source="stream", address=str(folder), size=8, classes=classes))
    require_fit(stream, (3, 8, 8), {"label": torch.tensor(0)}, MadeWith(classes=classes))
    return StreamedTensors(stream, classes, torch.tensor([5, 6, 7]))


def test_labels_are_whole_numbers_of_any_type_within_the_classes(tmp_path: Path) -> None:
    draws, device = Draws(0, 0, range(3)), torch.device("cpu")
    for dtype in ("uint8", "int32", "int64"):
        batch = labelled(tmp_path / dtype, [2, 0, 1], dtype).batch(torch.arange(3), draws, device)
        assert batch.condition["label"].tolist() == [7, 5, 6]
    with pytest.raises(StreamError, match="a label is -1, and there are 3 classes"):
        labelled(tmp_path / "negative", [0, -1, 1], "int64").batch(torch.arange(3), draws, device)
    with pytest.raises(StreamError, match="holds label of float32; whole numbers are needed"):
        labelled(tmp_path / "float", [0], "float32")


def test_tables_and_pictures_read_a_few_shards_and_a_picture_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, read = labelled(tmp_path, [0] * 40, "int64"), list[str]()
    contents_of = ShardStream._read

    def counted(stream: ShardStream, shard: IndexedShard) -> Contents:
        read.append(shard.name)
        return contents_of(stream, shard)

    monkeypatch.setattr(ShardStream, "_read", counted)
    monkeypatch.setattr("training.rounds.ROWS", 32)
    run: Any = SimpleNamespace(
        data=data,
        device=torch.device("cpu"),
        recipe=SimpleNamespace(seed=0, guidance=(0.0, 4.0)),
        decoded=lambda z: z,
    )
    Trial.of(run, encoding=False)
    assert len(read) == len(set(read)) == 4, "of ten"
    picture = Picture(run)
    for first in range(0, 40, 4):
        picture.of(lambda z, t, condition, w: z, Schedule.cosine().grid(1))
        data.batch(torch.arange(first, first + 4), Draws(0, 0, range(4)), run.device)
    assert len(read) == 4 + 6, "the others, and none again"
