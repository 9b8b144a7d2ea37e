"""Class-conditional teachers from pipelines, distilled: DiT in latents, UNets in pixels, one network or two."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator, DistributedType
from PIL import Image

from engines.bundle import Bundle
from engines.pipeline import Pipeline
from engines.rows import noise_of
from engines.tasks import Generate
from tests import pipelines
from training.commands import open_finished_run
from training.data.place import StreamError
from training.distill import distill, train_teacher
from training.draws import Draws
from training.errors import TrainingError
from training.exporting.export import export, step_graph
from training.networks import GUIDANCE_WEIGHTS
from training.precompute import precompute
from training.pretrained.pipelines import student_card
from training.pretrained.teachers import TeacherError, TeacherPipeline
from training.recipe import Recipe
from training.run import Run
from training.sampler import sample
from training.sections import DataRecipe
from training.stages import encoder_stage, student_stage

SHORT = {"updates": 2, "batch_size": 4, "learning_rate": 3e-3}
RECIPE = """
name = "classes"
conditioning = "class"
data = {{ path = "{images}", size = 8 }}
teacher = {{ checkpoint = "{checkpoint}" }}
stage1 = {{ updates = 2, batch_size = 4, learning_rate = 3e-3 }}
export = {{ licence = "CC0-1.0", steps = [2, 1] }}

[stage2]
start = 4
rounds = [
    {{ steps = 2, updates = 2, batch_size = 4, learning_rate = 3e-3 }},
    {{ steps = 1, updates = 2, batch_size = 4, learning_rate = 3e-3 }},
]

[encoder]
start = 4
rounds = [{{ steps = 2, updates = 2, batch_size = 4, learning_rate = 3e-3 }}]
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images of each of three classes."""
    folder = tmp_path_factory.mktemp("images")
    for k, name in enumerate(("ant", "bee", "cat")):
        (folder / name).mkdir()
        for i in range(4):
            Image.new("RGB", (16, 16), (60 * i, 80 * k, 100)).save(folder / name / f"{i}.png")
    return folder


def make_run(folder: Path, images: Path, size: int, **teacher: Any) -> Run:
    recipe = Recipe.model_validate(
        {
            "name": "classes",
            "conditioning": "class",
            "data": {"path": images, "size": size},
            "teacher": {name: str(v) if isinstance(v, Path) else v for name, v in teacher.items()},
            "stage1": SHORT,
            "stage2": {"start": 4, "rounds": [{"steps": steps, **SHORT} for steps in (2, 1)]},
            "encoder": {"start": 4, "rounds": [{"steps": 2, **SHORT}]},
            "export": {"licence": "CC0-1.0", "steps": [2, 1]},
        }
    )
    return Run(recipe, folder, Accelerator(cpu=True))


def check_student(run: Run) -> None:
    """It is made again from its folder, heeds its class and w, and the pipeline's scheduler lies beside it."""
    distill(run)
    draws = Draws(0, 0, range(4))
    batch = run.data.batch(torch.arange(4), draws, torch.device("cpu"))
    noise, w = draws.normal(batch.x), torch.tensor([0.0, 1.0, 2.0, 4.0])
    student = run.denoiser(student_stage(2))
    made = sample(student, run.schedule.grid(2), noise, batch.condition, w)
    assert made.isfinite().all()
    unguided = sample(student, run.schedule.grid(2), noise, batch.condition, torch.zeros(4))
    assert torch.equal(made[0], unguided[0])
    assert not torch.equal(made[1:], unguided[1:])
    assert (run.folder / student_stage(2) / "scheduler").is_dir()
    assert run.is_done(encoder_stage(2))
    assert (run.folder / student_stage(2) / "samples.png").exists()
    assert not (run.folder / encoder_stage(2) / "samples.png").exists(), "noise is nothing to look at"
    rows = json.loads((run.folder / "rounds.json").read_text())
    assert [row["stage"] for row in rows] == ["stage1", "student-2", "student-1", "encoder-2"]


def name_classes(checkpoint: Path) -> Path:
    """Give a teacher of three classes names for them in another order than that of the images."""
    index = checkpoint / "model_index.json"
    names = {"id2label": {"0": "cat", "1": "ant", "2": "bee"}}
    index.write_text(json.dumps(json.loads(index.read_text()) | names))
    return checkpoint


def check_bundle(run: Run, bundle: Bundle) -> None:
    """For each of its classes, by name, it takes the steps that the student takes for the teacher's number."""
    names = bundle.manifest.classes
    with Pipeline.open(bundle.path) as pipeline:
        rows = pipeline.prepare([Generate(name, 1, 1.0, seed=3) for name in names])
        pipeline.tick(rows)
    z = torch.from_numpy(noise_of(3, run.shape)).repeat(len(names), 1, 1, 1)
    label = {"label": run.class_numbers}
    expected = sample(run.denoiser(student_stage(1)), run.schedule.grid(1), z, label, torch.ones(len(names)))
    torch.testing.assert_close(torch.from_numpy(np.stack([row.z for row in rows])), expected, atol=1e-3, rtol=0)
    assert (expected[0] - expected[1:]).flatten(1).abs().amax(1).min() > 1e-2


@pytest.mark.slow
def test_a_dit_in_latents_with_classes_in_another_order(images: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", images, 32, checkpoint=name_classes(pipelines.dit(tmp_path / "dit")))
    check_student(run)
    assert run.null["label"] == pipelines.CLASSES
    bundle = export(run, tmp_path / "bundle", ("fp32",))
    assert bundle.manifest.classes == ("ant", "bee", "cat")
    check_bundle(run, bundle)


def test_a_unet_in_pixels_with_a_null_class_and_some_of_its_classes(images: Path, tmp_path: Path) -> None:
    shutil.copytree(images / "bee", tmp_path / "images" / "1")
    shutil.copytree(images / "cat", tmp_path / "images" / "2")
    run = make_run(tmp_path / "run", tmp_path / "images", 8, checkpoint=pipelines.class_unet(tmp_path / "unet"))
    check_student(run)
    bundle = export(run, tmp_path / "bundle", ("fp32",))
    assert bundle.manifest.space == "pixel"
    check_bundle(run, bundle)


def test_a_unet_guided_by_a_second_one_without_classes(images: Path, tmp_path: Path) -> None:
    conditional = pipelines.class_unet(tmp_path / "conditional", classes=3)
    unconditional = pipelines.class_unet(tmp_path / "unconditional", classes=None, seed=1)
    run = make_run(tmp_path / "run", images, 8, checkpoint=conditional, unconditional=unconditional)
    assert run.null == {}
    check_student(run)


def test_a_second_network_that_knows_classes_is_given_one_that_stands_for_none(images: Path, tmp_path: Path) -> None:
    conditional = pipelines.class_unet(tmp_path / "conditional", classes=3)
    for classes, null_class, label in ((4, None, 3), (5, 3, 3)):
        second = pipelines.class_unet(tmp_path / f"second-{classes}", classes=classes, seed=1)
        null = {} if null_class is None else {"null_class": null_class}
        run = make_run(tmp_path / f"run-{classes}", images, 8, checkpoint=conditional, unconditional=second, **null)
        assert run.null == {"label": torch.tensor(label)}
    second = pipelines.class_unet(tmp_path / "second", classes=3, seed=1)
    run = make_run(tmp_path / "taken", images, 8, checkpoint=conditional, unconditional=second)
    with pytest.raises(TrainingError, match="second has no class left that stands for none"):
        _ = run.null
    without = pipelines.class_unet(tmp_path / "without", classes=None)
    run = make_run(tmp_path / "none", images, 8, checkpoint=conditional, unconditional=without, null_class=0)
    with pytest.raises(TeacherError, match="without knows no classes"):
        _ = run.null


def test_classes_that_the_teacher_does_not_know_are_not_precomputed(images: Path, tmp_path: Path) -> None:
    for name in ("dog", "emu"):
        shutil.copytree(images / "ant", tmp_path / "others" / name)
    run = make_run(tmp_path / "run", tmp_path / "others", 32, checkpoint=pipelines.dit(tmp_path / "dit"))
    with pytest.raises(TeacherError, match="the images have 2"):
        precompute(run, str(tmp_path / "shards"), per_shard=5)
    unet = pipelines.class_unet(tmp_path / "unet", classes=3)
    with pytest.raises(TrainingError, match="no class left that stands for none"):
        precompute(make_run(tmp_path / "unet-run", images, 8, checkpoint=unet), str(tmp_path / "shards"), per_shard=5)
    assert not (tmp_path / "shards").exists()


def test_a_teacher_of_another_kind_of_condition_is_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="conditioned on prompts, the recipe on class"):
        make_run(tmp_path / "run", images, 32, checkpoint=pipelines.stable_diffusion(tmp_path / "sd"))


def test_a_second_network_has_a_revision_and_a_variant_of_its_own(images: Path, tmp_path: Path) -> None:
    both = {
        "checkpoint": pipelines.class_unet(tmp_path / "conditional", classes=3),
        "unconditional": pipelines.class_unet(tmp_path / "unconditional", classes=None),
    }
    for folder, variant in zip(both.values(), ("fp16", "bf16"), strict=True):
        weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
        weights.rename(weights.with_suffix(f".{variant}.safetensors"))
    run = make_run(tmp_path / "run", images, 8, **both, variant="fp16", unconditional_variant="bf16")
    assert run.pipeline is not None
    assert run.unconditional is not None
    assert (run.pipeline.variant, run.unconditional.variant) == ("fp16", "bf16")
    with pytest.raises(TeacherError, match="unconditional is a folder, which has no revision 'v2'"):
        make_run(tmp_path / "run", images, 8, **both, variant="fp16", unconditional_revision="v2")


def test_two_networks_of_different_schedules_are_refused(images: Path, tmp_path: Path) -> None:
    conditional = pipelines.class_unet(tmp_path / "conditional", classes=3)
    unconditional = pipelines.class_unet(tmp_path / "unconditional", classes=None)
    file = unconditional / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"beta_end": 0.03}))
    with pytest.raises(TrainingError, match="different noise schedules"):
        make_run(tmp_path / "run", images, 8, checkpoint=conditional, unconditional=unconditional)


def test_two_networks_of_different_shapes_are_refused(images: Path, tmp_path: Path) -> None:
    unconditional = pipelines.class_unet(tmp_path / "unconditional", classes=None)
    with pytest.raises(TeacherError, match="channels differs: 4"):
        make_run(tmp_path / "run", images, 32, checkpoint=pipelines.dit(tmp_path / "dit"), unconditional=unconditional)


def test_a_second_network_of_another_size_is_refused_before_training(images: Path, tmp_path: Path) -> None:
    unconditional = pipelines.dit(tmp_path / "unconditional")
    file = unconditional / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"sample_size": 8}))
    conditional = pipelines.dit(tmp_path / "dit")
    with pytest.raises(TeacherError, match="unconditional takes images of side 16, not 32"):
        make_run(tmp_path / "run", images, 32, checkpoint=conditional, unconditional=unconditional)


def test_a_checkpoint_that_brings_its_network_takes_no_other(images: Path) -> None:
    with pytest.raises(ValueError, match="brings its own network"):
        Recipe.model_validate(
            {
                "name": "both",
                "conditioning": "class",
                "data": {"path": images, "size": 8},
                "teacher": {"checkpoint": "x"},
                "network": {"channels": [8]},
                "stage1": SHORT,
                "stage2": {"start": 2, "rounds": [{"steps": 1, **SHORT}]},
                "export": {"licence": "CC0-1.0", "steps": [1]},
            }
        )


def test_streamed_labels_are_the_teachers_numbers(images: Path, tmp_path: Path) -> None:
    checkpoint = name_classes(pipelines.dit(tmp_path / "dit"))
    run = make_run(tmp_path / "run", images, 32, checkpoint=checkpoint)
    precompute(run, str(tmp_path / "shards"), per_shard=5)
    data = DataRecipe(source="stream", address=str(tmp_path / "shards"), size=32, classes=("ant", "bee", "cat"))
    streamed = Run(run.recipe.model_copy(update={"data": data}), tmp_path / "streamed", Accelerator(cpu=True))
    items, device = torch.arange(12), torch.device("cpu")
    ours, theirs = (r.data.batch(items, Draws(0, 0, range(12)), device).condition["label"] for r in (streamed, run))
    assert torch.equal(ours, theirs)
    assert set(ours.tolist()) == {0, 1, 2}
    graph, example = step_graph(streamed, "teacher", 2)
    (places,) = (value for name, value in zip(graph.input_names, example.at(12), strict=True) if name == "label")
    sent = streamed.data.batch(Draws(0, 12, range(12)).integers(12), Draws(0, 12, range(12)), device)
    assert graph.numbers is not None
    assert torch.equal(graph.numbers[places], sent.condition["label"])
    index = tmp_path / "shards" / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"made_with": None}))  # as older ones are
    few = data.model_copy(update={"classes": ("ant", "bee")})
    short = Run(run.recipe.model_copy(update={"data": few}), tmp_path / "few", Accelerator(cpu=True))
    with pytest.raises(StreamError, match="there are 2 classes"):
        short.data.batch(items, Draws(0, 0, range(12)), device)


def test_what_does_not_fit_the_teacher_is_refused_before_its_network_is_read(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A side or a class for none before the run has a folder, the images' classes before it is trained."""
    dit, unet = pipelines.dit(tmp_path / "dit"), pipelines.class_unet(tmp_path / "unet", classes=3)

    def read(*_: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(TeacherPipeline, "_load", read)
    for size, teacher, says in (
        (64, {"checkpoint": dit}, "side 32, not 64"),
        (32, {"checkpoint": dit, "null_class": 9}, "9 is none of them"),
    ):
        with pytest.raises(TeacherError, match=says):
            make_run(tmp_path / "run", images, size, **teacher)
    assert not (tmp_path / "run").exists()
    with pytest.raises(TrainingError, match="no class left that stands for none"):
        distill(make_run(tmp_path / "unet-run", images, 8, checkpoint=unet))
    (tmp_path / "few" / "dog").mkdir(parents=True)
    shutil.copy(images / "ant" / "0.png", tmp_path / "few" / "dog")
    with pytest.raises(TeacherError, match="the images have 1"):
        distill(make_run(tmp_path / "few-run", tmp_path / "few", 8, checkpoint=unet, null_class=0))


def test_another_teacher_in_the_same_place_is_noticed(images: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", images, 8, checkpoint=pipelines.class_unet(tmp_path / "unet"))
    distill(run)
    recipe = tmp_path / "classes.toml"
    recipe.write_text(RECIPE.format(images=images, checkpoint=tmp_path / "unet"))
    finished = open_finished_run(recipe, run.folder, None)
    guidance = run.folder / student_stage(1) / run.network_part / GUIDANCE_WEIGHTS
    whole = guidance.read_bytes()
    guidance.write_bytes(whole[:50])
    with pytest.raises(TrainingError, match="the network of a stage that is done cannot be read"):
        finished.denoiser(student_stage(1))
    guidance.write_bytes(whole)
    finished.denoiser(student_stage(1))
    pipelines.class_unet(tmp_path / "unet", seed=5)
    with pytest.raises(TrainingError, match="another teacher"):
        distill(make_run(tmp_path / "run", images, 8, checkpoint=tmp_path / "unet"))
    with pytest.raises(TrainingError, match="another teacher"):
        open_finished_run(recipe, run.folder, None)


def test_another_class_for_none_is_another_teacher(images: Path, tmp_path: Path) -> None:
    checkpoint = pipelines.class_unet(tmp_path / "unet", classes=5)
    weights = {
        make_run(tmp_path / str(given), images, 8, checkpoint=checkpoint, **given).weights("teacher")
        for given in ({}, {"null_class": 4}, {"null_class": 3})
    }
    assert len(weights) == 3


def test_a_second_network_that_comes_later_or_is_another_is_noticed(images: Path, tmp_path: Path) -> None:
    first = pipelines.class_unet(tmp_path / "first")
    seconds = [pipelines.class_unet(tmp_path / f"{seed}", classes=None, seed=seed) for seed in (1, 2)]
    train_teacher(make_run(tmp_path / "alone", images, 8, checkpoint=first))
    train_teacher(make_run(tmp_path / "pair", images, 8, checkpoint=first, unconditional=seconds[0]))
    for run, unconditional in (("alone", seconds[0]), ("pair", seconds[1])):
        with pytest.raises(TrainingError, match="another teacher"):
            train_teacher(make_run(tmp_path / run, images, 8, checkpoint=first, unconditional=unconditional))


def test_classes_that_a_teacher_numbers_otherwise_than_before_are_noticed(images: Path, tmp_path: Path) -> None:
    checkpoint = name_classes(pipelines.class_unet(tmp_path / "unet"))
    assert len(make_run(tmp_path / "run", images, 8, checkpoint=checkpoint).data) == 12
    assert len(make_run(tmp_path / "run", images, 8, checkpoint=checkpoint).data) == 12
    index = checkpoint / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": {"0": "ant", "1": "bee", "2": "cat"}}))
    with pytest.raises(TrainingError, match=r"its classes differ.*data-classes\.json"):
        _ = make_run(tmp_path / "run", images, 8, checkpoint=checkpoint).data


def test_a_ladder_longer_than_the_schedule_is_refused(images: Path, tmp_path: Path) -> None:
    recipe = make_run(tmp_path / "run", images, 8, checkpoint=pipelines.class_unet(tmp_path / "unet")).recipe
    longer = recipe.stage2.model_copy(update={"start": 2048})
    with pytest.raises(TrainingError, match="2048 steps cannot be taken on 1000 timesteps"):
        Run(recipe.model_copy(update={"stage2": longer}), tmp_path / "longer", Accelerator(cpu=True))


def test_an_average_that_sharded_weights_cannot_have_is_refused_before_anything_is_trained(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_run(tmp_path / "run", images, 8, checkpoint=pipelines.class_unet(tmp_path / "unet")).recipe
    *first, last = recipe.stage2.rounds
    stage2 = recipe.stage2.model_copy(update={"rounds": (*first, last.model_copy(update={"ema": 0.9}))})
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(TrainingError, match="set ema to 0"):
        Run(recipe.model_copy(update={"stage2": stage2}), tmp_path / "sharded", Accelerator(cpu=True))


@pytest.mark.parametrize("licence", ["CC-BY-4.0", "Other: see LICENSE", "#none", "[x", "no"])
def test_the_students_card_says_its_licence_in_yaml(images: Path, tmp_path: Path, licence: str) -> None:
    recipe = make_run(tmp_path / "run", images, 8, checkpoint=pipelines.class_unet(tmp_path / "unet")).recipe
    named = recipe.model_copy(update={"export": recipe.export.model_copy(update={"licence": licence})})
    front = student_card(named, 2, 1000, has_pipeline=False).split("---\n")[1]
    assert yaml.safe_load(front)["license"] == licence.lower()


def test_the_students_card_names_no_pipeline_where_there_is_none(images: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", images, 8, checkpoint=pipelines.class_unet(tmp_path / "unet"))
    distill(run)
    card = (run.folder / student_stage(2) / "README.md").read_text()
    assert "num_inference_steps" not in card
    assert "fewstep export" in card


def test_a_recipe_whose_teacher_cannot_be_opened_claims_no_folder(images: Path, tmp_path: Path) -> None:
    with pytest.raises(TeacherError):
        make_run(tmp_path / "run", images, 8, checkpoint=tmp_path / "absent")
    assert not (tmp_path / "run").exists()
