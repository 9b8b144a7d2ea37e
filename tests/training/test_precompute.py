"""Shards of latents and prompts: what a run in memory learns from, streamed."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from click.testing import CliRunner

import fewstep
from tests import pipelines
from tests.training.test_pipelines import recipe, write_squares
from training.data.entries import DataError
from training.data.place import StreamError
from training.data.shard_order import ShardOrder
from training.data.shard_writer import PROGRESS
from training.distill import distill, student_stage
from training.draws import Draws
from training.evaluation_set import load_evaluation_set
from training.loop import TrainingError
from training.precompute import precompute
from training.recipe import CheckpointRecipe, DataRecipe
from training.run import Run

DEVICE = torch.device("cpu")


@pytest.fixture(scope="module")
def in_memory(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("precompute")
    write_squares(root / "squares")
    checkpoint = pipelines.stable_diffusion_xl(root / "sdxl")
    short = {"start": 2, "rounds": [{"steps": 1, "updates": 2, "batch_size": 4, "learning_rate": 3e-3}]}
    made = recipe(checkpoint, root / "squares", stage2=short, export={"licence": "CC0-1.0", "steps": [1]})
    return Run(made, root / "run", Accelerator(cpu=True))


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


def write_shard(path: Path, run: Run) -> None:
    """The run's images, in its order, as a shard."""
    folder = run.recipe.data.path
    assert folder is not None
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    with tarfile.open(path, "w") as archive:
        for k, line in enumerate(lines):
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


def test_shards_of_images_have_no_classes_to_precompute(in_memory: Run, tmp_path: Path) -> None:
    run = image_stream(in_memory, tmp_path)
    run.__dict__["prompts"] = None
    with pytest.raises(TrainingError, match="captions and no classes"):
        precompute(run, str(tmp_path / "tensors"), per_shard=4)


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


def test_tensors_are_not_precomputed_again(in_memory: Run, tmp_path: Path) -> None:
    precompute(in_memory, str(tmp_path / "shards"), per_shard=3)
    run = streaming(in_memory, tmp_path / "run", str(tmp_path / "shards"))
    with pytest.raises(TrainingError, match="holds tensors already"):
        precompute(run, str(tmp_path / "again"), per_shard=3)


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
    precompute(run, str(tmp_path / "latents"), per_shard=4)
    with pytest.raises(TrainingError, match="an inpainting network learns from images"):
        _ = streaming(run, tmp_path / "refused", str(tmp_path / "latents")).data
