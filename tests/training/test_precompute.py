"""Shards of latents and prompts: what a run in memory learns from, streamed."""

from __future__ import annotations

import io
import json
import tarfile
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from click.testing import CliRunner
from PIL import Image

import fewstep
from tests import pipelines
from tests.training.test_pipelines import recipe, write_squares
from training.data.entries import DataError
from training.data.order import ShardOrder
from training.data.place import StreamError
from training.data.shard_index import make_index
from training.data.shard_writer import PROGRESS
from training.distill import distill, train_autoencoder
from training.draws import Draws
from training.errors import TrainingError
from training.evaluation.evaluation_set import load_evaluation_set
from training.lock import training_alone
from training.precompute import precompute, section
from training.recipe import Recipe
from training.run import Run
from training.sections import CheckpointRecipe, DataRecipe
from training.stages import student_stage

DEVICE = torch.device("cpu")
SHORT = {"updates": 1, "batch_size": 2, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def in_memory(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("precompute")
    write_squares(root / "squares")
    checkpoint = pipelines.stable_diffusion_xl(root / "sdxl")
    short = {"start": 2, "rounds": [{"steps": 1, "updates": 2, "batch_size": 4, "learning_rate": 3e-3}]}
    made = recipe(checkpoint, root / "squares", stage2=short, export={"licence": "CC0-1.0", "steps": [1]})
    return Run(made, root / "run", Accelerator(cpu=True))


def run_of_classes(folder: Path, data: dict[str, Any], **sections: Any) -> Run:
    """A run that trains a teacher of classes."""
    made = Recipe.model_validate(
        {
            "name": "classes",
            "conditioning": "class",
            "data": data,
            "network": {"channels": [8], "norm_groups": 4},
            "teacher": SHORT,
            "stage1": SHORT,
            "stage2": {"start": 2, "rounds": [{"steps": 1, **SHORT}]},
            "export": {"licence": "CC0-1.0", "steps": [1]},
            **sections,
        }
    )
    return Run(made, folder, Accelerator(cpu=True))


def streaming(run: Run, folder: Path, address: str) -> Run:
    data = DataRecipe(source="stream", address=address, size=pipelines.SIZE)
    return Run(run.recipe.model_copy(update={"data": data}), folder, Accelerator(cpu=True))


def test_a_streamed_batch_is_the_one_in_memory(in_memory: Run, tmp_path: Path) -> None:
    assert precompute(in_memory, str(tmp_path / "shards"), per_shard=3) == 4
    run = streaming(in_memory, tmp_path / "run", str(tmp_path / "shards"))
    items = torch.tensor([3, 0, 2])
    ours, theirs = (r.data.batch(items, Draws(0, 0, range(3)), DEVICE) for r in (run, in_memory))
    assert torch.allclose(ours.x, theirs.x, atol=2e-3)
    assert set(ours.condition) == set(theirs.condition) == {"context", "pooled", "size"}
    for name, value in theirs.condition.items():
        assert torch.allclose(ours.condition[name], value, atol=2e-3)


def test_a_streamed_run_is_distilled_and_repeats_itself(in_memory: Run, tmp_path: Path) -> None:
    precompute(in_memory, str(tmp_path / "shards"), per_shard=2)
    weights = []
    for name in ("first", "second"):
        run = streaming(in_memory, tmp_path / name, str(tmp_path / "shards"))
        assert isinstance(run.data.order(4, 0), ShardOrder)
        distill(run)
        weights.append(run.weights(student_stage(1)))
    assert weights[0] == weights[1]


def test_images_are_encoded_as_they_are_streamed_and_learned_from(in_memory: Run, tmp_path: Path) -> None:
    run = image_stream(in_memory, tmp_path)
    items = torch.arange(4)
    batch = run.data.batch(items, Draws(0, 0, range(4)), DEVICE)
    theirs = in_memory.data.batch(items, Draws(0, 0, range(4)), DEVICE)
    assert torch.allclose(batch.x, theirs.x, atol=1e-5)
    assert torch.allclose(batch.condition["context"], theirs.condition["context"], atol=2e-3)
    assert precompute(run, str(tmp_path / "tensors"), per_shard=4) == 4
    distill(run)
    assert run.is_done(student_stage(1))


def image_stream(run: Run, folder: Path) -> Run:
    """A run that streams the images of another one, out of an indexed shard."""
    (folder / "shards").mkdir()
    write_shard(folder / "shards" / "0.tar", run)
    indexed = CliRunner().invoke(fewstep.main, ["data", "index", str(folder / "shards")])
    assert indexed.exit_code == 0, indexed.output
    return streaming(run, folder / "run", str(folder / "shards"))


def write_shard(path: Path, run: Run, rows: range = range(4)) -> None:
    """Images of the run, in its order, as a shard."""
    folder = run.recipe.data.path
    assert folder is not None
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    with tarfile.open(path, "w") as archive:
        for k in rows:
            line = lines[k]
            for suffix, data in (
                (".png", (folder / line["file_name"]).read_bytes()),
                (".json", json.dumps(line).encode()),
            ):
                info = tarfile.TarInfo(f"{k}{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def test_tensors_of_another_shape_are_refused(in_memory: Run, tmp_path: Path) -> None:
    precompute(in_memory, str(tmp_path / "shards"), per_shard=3)
    data = DataRecipe(source="stream", address=str(tmp_path / "shards"), size=2 * pipelines.SIZE)
    other = Run(in_memory.recipe.model_copy(update={"data": data}), tmp_path / "run", Accelerator(cpu=True))
    with pytest.raises(StreamError, match=r"x \(4, 32, 32\) is needed"):
        _ = other.data


def test_contexts_of_another_width_are_refused(in_memory: Run, tmp_path: Path) -> None:
    """As those of Stable Diffusion 1 for Stable Diffusion 2."""
    precompute(in_memory, str(tmp_path / "shards"), per_shard=3)
    run = streaming(in_memory, tmp_path / "run", str(tmp_path / "shards"))
    null = {name: value[..., : pipelines.WIDTH] for name, value in in_memory.null.items()}
    run.__dict__["prompts"] = SimpleNamespace(null=null, identity="another")
    with pytest.raises(StreamError, match=r"context \(12, 32\), .* context \(12, 16\), .* is needed"):
        _ = run.data


def test_contexts_of_another_encoder_of_the_same_width_are_refused(in_memory: Run, tmp_path: Path) -> None:
    precompute(in_memory, str(tmp_path / "shards"), per_shard=3)
    run = streaming(in_memory, tmp_path / "run", str(tmp_path / "shards"))
    run.__dict__["prompts"] = SimpleNamespace(null=in_memory.null, identity="another")
    with pytest.raises(StreamError, match="made with another encoder of prompts"):
        _ = run.data


def with_data(run: Run, folder: Path, **changes: Any) -> Run:
    """The run with other settings of its data."""
    data = DataRecipe.model_validate(run.recipe.data.model_dump(exclude_unset=True) | changes)
    return Run(run.recipe.model_copy(update={"data": data}), folder, Accelerator(cpu=True))


def test_cropped_images_are_told_from_padded_ones(in_memory: Run, tmp_path: Path) -> None:
    """By the shards of what was made of them, in a run that streams these, and where they are being made."""
    padded, shards = image_stream(in_memory, tmp_path), str(tmp_path / "cropped")
    cropped = with_data(padded, tmp_path / "making", fit="crop")
    assert precompute(cropped, shards, per_shard=3) == 4
    index = json.loads((tmp_path / "cropped" / "index.json").read_text())
    assert index["made_with"]["fit"] == "crop"
    assert tomllib.loads(section(cropped, shards))["data"]["fit"] == "crop"
    with pytest.raises(StreamError, match=r'made with data\.fit = "crop", and the recipe has "pad"'):
        _ = with_data(padded, tmp_path / "pad", address=shards).data
    assert len(with_data(cropped, tmp_path / "crop", address=shards).data) == 4
    with pytest.raises(StreamError, match="begun from another source"):
        precompute(padded, shards, per_shard=3)
    assert precompute(padded, str(tmp_path / "padded"), per_shard=3) == 4
    assert "fit" not in (tmp_path / "padded" / "index.json").read_text(), "as in those from before there was a choice"


def test_what_was_begun_over_one_background_does_not_go_on_over_another(in_memory: Run, tmp_path: Path) -> None:
    white, shards = image_stream(in_memory, tmp_path), str(tmp_path / "white")
    assert precompute(white, shards, per_shard=3) == 4
    black = with_data(white, tmp_path / "black", background=(0, 0, 0))
    with pytest.raises(StreamError, match="begun from another source"):
        precompute(black, shards, per_shard=3)
    assert precompute(black, str(tmp_path / "black"), per_shard=3) == 4
    assert precompute(with_data(white, tmp_path / "again", background=(255, 255, 255)), shards, per_shard=3) == 4


def test_a_background_of_tensors_is_refused(in_memory: Run, tmp_path: Path) -> None:
    precompute(in_memory, str(tmp_path / "shards"), per_shard=3)
    run = streaming(in_memory, tmp_path / "run", str(tmp_path / "shards"))
    with pytest.raises(TrainingError, match=r"leave out data\.background"):
        _ = with_data(run, tmp_path / "black", background=(0, 0, 0)).data


@pytest.mark.parametrize(
    ("suffix", "said", "labels"),
    [
        (".cls", ("1", "0", "1"), [1, 0, 1]),
        (".json", ('{"class_name": "dog"}', '{"class_name": "cat"}', '{"class_name": "dog"}'), [1, 0, 1]),
        (".cls", ("1", "2", "1"), "an image is of class '2'; the recipe's are cat, dog"),
        (".txt", ("a dog", "a cat", "a dog"), r"an image has no class \(a \.cls, or"),
    ],
)
def test_shards_of_images_with_classes_become_tensors_that_are_streamed(
    tmp_path: Path, suffix: str, said: tuple[str, ...], labels: list[int] | str
) -> None:
    (tmp_path / "images").mkdir()
    with tarfile.open(tmp_path / "images" / "0.tar", "w") as archive:
        for k, text in enumerate(said):
            picture = io.BytesIO()
            Image.new("RGB", (8, 8), (80 * k, 0, 0)).save(picture, "PNG")
            for name, data in ((f"{k}.png", picture.getvalue()), (f"{k}{suffix}", text.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    make_index(str(tmp_path / "images"))
    data = {"source": "stream", "address": str(tmp_path / "images"), "size": 8, "classes": ["cat", "dog"]}
    run = run_of_classes(tmp_path / "run", data)
    with pytest.raises(TrainingError, match="`fewstep precompute` makes shards of those with classes"):
        _ = run.data
    if isinstance(labels, str):
        with pytest.raises(TrainingError, match=labels):
            precompute(run, str(tmp_path / "tensors"), per_shard=2)
        return
    assert precompute(run, str(tmp_path / "tensors"), per_shard=2) == 3
    streamed = with_data(run, tmp_path / "streamed", address=str(tmp_path / "tensors"))
    batch = streamed.data.batch(torch.arange(3), Draws(0, 0, range(3)), DEVICE)
    assert batch.condition["label"].tolist() == labels


def test_an_autoencoder_is_trained_while_no_other_process_trains_in_its_folder(tmp_path: Path) -> None:
    """And once it is there, others may."""
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name / "0.png")
    autoencoder = {"channels": [8, 8], "norm_groups": 4, **SHORT}
    run = run_of_classes(tmp_path / "run", {"path": str(tmp_path / "images"), "size": 8}, autoencoder=autoencoder)
    with training_alone(run.folder), pytest.raises(TrainingError, match="another process is training in"):
        precompute(run, str(tmp_path / "shards"), per_shard=2)
    assert not (run.folder / "autoencoder").exists()
    assert precompute(run, str(tmp_path / "shards"), per_shard=2) == 2
    with training_alone(run.folder):
        assert precompute(run, str(tmp_path / "shards"), per_shard=2) == 2


@pytest.mark.parametrize("asked", [True, False])
def test_an_autoencoder_is_trained_with_gradient_checkpointing_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: bool
) -> None:
    (tmp_path / "images" / "cat").mkdir(parents=True)
    for k in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / "cat" / f"{k}.png")
    calls: list[object] = []
    checkpoint = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        torch.utils.checkpoint, "checkpoint", lambda *given, **how: calls.append(given) or checkpoint(*given, **how)
    )
    run = run_of_classes(
        tmp_path / "run",
        {"path": str(tmp_path / "images"), "size": 8},
        autoencoder={"channels": [8, 8], "norm_groups": 4, **SHORT},
        scale={"gradient_checkpointing": asked},
    )
    train_autoencoder(run)
    assert bool(calls) == asked


def test_streamed_images_are_encoded_in_full_precision(in_memory: Run, tmp_path: Path) -> None:
    run = image_stream(in_memory, tmp_path)
    items = torch.arange(4)
    plain = run.data.batch(items, Draws(0, 0, range(4)), DEVICE)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = run.data.batch(items, Draws(0, 0, range(4)), DEVICE)
    assert torch.equal(mixed.x, plain.x)
    assert torch.equal(mixed.condition["context"], plain.condition["context"])


def test_precomputing_streamed_images_again_leaves_them_as_they_are(in_memory: Run, tmp_path: Path) -> None:
    """Where all is there, and where the shards are and their index was not written."""
    run = image_stream(in_memory, tmp_path)
    assert precompute(run, str(tmp_path / "tensors"), per_shard=2) == 4
    index = tmp_path / "tensors" / "index.json"
    written = index.read_bytes()
    assert precompute(run, str(tmp_path / "tensors"), per_shard=2) == 4
    index.rename(tmp_path / "tensors" / PROGRESS)
    assert precompute(run, str(tmp_path / "tensors"), per_shard=2) == 4
    assert index.read_bytes() == written


def test_what_stands_in_for_a_lost_shard_is_not_precomputed(in_memory: Run, tmp_path: Path) -> None:
    shards, tensors = tmp_path / "shards", tmp_path / "tensors"
    shards.mkdir()
    write_shard(shards / "0.tar", in_memory, range(2))
    write_shard(shards / "1.tar", in_memory, range(2, 4))
    make_index(str(shards))
    run = streaming(in_memory, tmp_path / "run", str(shards))
    (shards / "1.tar").rename(tmp_path / "away.tar")
    with pytest.raises(StreamError, match=r"shards of .* are lost: 1\.tar"):
        precompute(run, str(tensors), per_shard=2)
    (tmp_path / "away.tar").rename(shards / "1.tar")
    again = streaming(in_memory, tmp_path / "again", str(shards))
    assert precompute(again, str(tensors), per_shard=2) == 4
    batches = [
        streaming(in_memory, tmp_path / place.name / "run", str(place)).data.batch(
            torch.arange(4), Draws(0, 0, range(4)), DEVICE
        )
        for place in (shards, tensors)
    ]
    assert torch.allclose(batches[0].x, batches[1].x, atol=1e-2)  # tensors are in fp16


def test_tensors_are_not_precomputed_again(in_memory: Run, tmp_path: Path) -> None:
    precompute(in_memory, str(tmp_path / "shards"), per_shard=3)
    run = streaming(in_memory, tmp_path / "run", str(tmp_path / "shards"))
    with pytest.raises(TrainingError, match="holds tensors already"):
        precompute(run, str(tmp_path / "again"), per_shard=3)


def test_a_class_that_was_corrected_is_other_data(tmp_path: Path) -> None:
    """Also where captions say nothing of it."""
    images = tmp_path / "images"
    images.mkdir()
    for k in range(3):
        Image.new("RGB", (8, 8), (80 * k, 0, 0)).save(images / f"{k}.png")

    def of_classes(*names: str) -> Run:
        lines = [{"file_name": f"{k}.png", "text": "a picture", "class_name": name} for k, name in enumerate(names)]
        (images / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
        return run_of_classes(tmp_path / "run", {"path": str(images), "size": 8})

    for _ in range(2):
        assert precompute(of_classes("cat", "dog", "cat"), str(tmp_path / "shards"), per_shard=2) == 3
    with pytest.raises(StreamError):
        precompute(of_classes("cat", "dog", "dog"), str(tmp_path / "shards"), per_shard=2)


def test_it_tells_of_captions_that_are_too_long(
    in_memory: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    precompute(in_memory, str(tmp_path / "short"), per_shard=4)
    assert "too long" not in capsys.readouterr().out
    run = Run(in_memory.recipe, tmp_path / "run", Accelerator(cpu=True))
    assert run.prompts is not None
    too_long = run.prompts.too_long
    run.prompts.too_long = lambda captions: too_long(captions) + 1  # type: ignore[method-assign]
    precompute(run, str(tmp_path / "long"), per_shard=4)
    assert "1 of 8 captions are too long for the text encoder" in capsys.readouterr().out


def test_another_text_encoder_than_before_is_noticed(in_memory: Run, tmp_path: Path) -> None:
    checkpoint = pipelines.stable_diffusion(tmp_path / "sd")
    teacher = {"teacher": CheckpointRecipe(checkpoint=str(checkpoint))}
    changed = in_memory.recipe.model_copy(update=teacher)
    assert len(Run(changed, tmp_path / "run", Accelerator(cpu=True)).data) == 4
    assert len(Run(changed, tmp_path / "run", Accelerator(cpu=True)).data) == 4
    torch.manual_seed(1)
    pipelines.text_encoder(pipelines.tokenizer(tmp_path)).save_pretrained(checkpoint / "text_encoder")
    with pytest.raises(TrainingError, match=r"its prompts differ.*data-prompts\.json"):
        _ = Run(changed, tmp_path / "run", Accelerator(cpu=True)).data


def test_a_streamed_run_is_evaluated_on_a_folder(in_memory: Run, tmp_path: Path) -> None:
    precompute(in_memory, str(tmp_path / "shards"), per_shard=3)
    run = streaming(in_memory, tmp_path / "run", str(tmp_path / "shards"))
    with pytest.raises(DataError, match="by --images"):
        load_evaluation_set(run, "train", 2, 0)
    found = load_evaluation_set(run, "train", 3, 0, in_memory.recipe.data.path)
    assert len(found) == 3
    assert set(found.condition) == {"context", "pooled", "size"}


def test_an_inpainting_network_learns_from_streamed_images_what_it_does_from_those_in_memory(
    in_memory: Run, tmp_path: Path
) -> None:
    checkpoint = pipelines.stable_diffusion(tmp_path / "inpainting", in_channels=9)
    changes = {"teacher": CheckpointRecipe(checkpoint=str(checkpoint))}
    run = Run(in_memory.recipe.model_copy(update=changes), tmp_path / "memory", Accelerator(cpu=True))
    streamed, items = image_stream(run, tmp_path), torch.tensor([3, 0, 2])
    ours, theirs = (r.data.batch(items, Draws(0, 0, range(3)), DEVICE) for r in (streamed, run))
    assert set(ours.condition) == {"context", "mask", "masked"}
    for name, value in {"x": theirs.x, **theirs.condition}.items():
        torch.testing.assert_close({"x": ours.x, **ours.condition}[name], value, atol=2e-3, rtol=0)
    assert 0 < ours.condition["mask"].mean() < 1
    with pytest.raises(TrainingError, match="an inpainting network learns from images"):
        precompute(run, str(tmp_path / "refused"), per_shard=4)
    assert not (tmp_path / "refused").exists()
    changes = {"teacher": CheckpointRecipe(checkpoint=str(pipelines.stable_diffusion(tmp_path / "plain")))}
    plain = Run(in_memory.recipe.model_copy(update=changes), tmp_path / "plain-run", Accelerator(cpu=True))
    precompute(plain, str(tmp_path / "latents"), per_shard=4)
    with pytest.raises(TrainingError, match="an inpainting network learns from images"):
        _ = streaming(run, tmp_path / "refused", str(tmp_path / "latents")).data
