"""A run becomes a bundle, and the bundle's images are those of torch: by class in pixels, by text in latents."""

from __future__ import annotations

import json
import shutil
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from click.testing import CliRunner
from diffusers import AutoencoderKL, StableDiffusionPipeline
from numpy.typing import NDArray
from PIL import Image

import fewstep
from engines.backends import open_engine
from engines.backends.base import EngineOptions
from engines.backends.standin import StandIn, wait_until_built
from engines.bundle import Bundle, BundleError, load_bundle
from engines.fidelity import typical_inputs
from engines.pipeline import Pipeline
from engines.rows import noise_of
from engines.tasks import Edit, Generate, Inpaint, Transfer
from training import networks
from training.distill import distill
from training.errors import TrainingError
from training.exporting.card import commit_of_code, data_name, model_card
from training.exporting.export import export
from training.exporting.graphs import ExportError
from training.pictures import to_uint8
from training.recipe import Recipe
from training.run import Run
from training.sampler import Kept, Leg, noised, sample, sample_stochastic, transfer
from training.stages import encoder_stage, student_stage
from training.text import MiniLMPrompts, load_text_encoder, load_tokenizer, tokenize

# Of 255, between ONNX Runtime and torch.
FP32_TOLERANCE = 2
# Of latents of about unit variance, the same.
LATENT_TOLERANCE = 2e-3
SMALL_WEIGHTS_TOLERANCE = 16
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (240, 220, 40)}


@pytest.fixture(scope="module")
def digits_bundle(digits_run: Run, tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Exported by the command, with torch programs and with a quality table."""
    folder, out = digits_run.folder / "evaluation", tmp_path_factory.mktemp("bundles") / "digits"
    stages = ("teacher", *(student_stage(steps) for steps in digits_run.recipe.export.steps))
    folder.mkdir()
    write_table(folder, json.dumps({"provenance": {"weights": {stage: digits_run.weights(stage) for stage in stages}}}))
    arguments = [str(tiny_recipe), str(out), "--run", str(digits_run.folder), "--programs"]
    result = CliRunner().invoke(fewstep.main, ["export", *arguments])
    shutil.rmtree(folder)
    assert result.exit_code == 0, result.output
    return load_bundle(out)


def write_table(folder: Path, provenance: str) -> None:
    """What an evaluation leaves: a table, and of which networks it is."""
    (folder / "table.md").write_text("| KID |")
    (folder / "table.json").write_text(provenance)


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Every part of a text-to-image run in a latent space, each trained for two updates.

    Its student of one step is for the stochastic sampler too, and that of two has an encoder.
    """
    images = tmp_path_factory.mktemp("squares")
    lines = []
    for name, colour in COLOURS.items():
        Image.new("RGB", (16, 16), colour).save(images / f"{name}.png")
        lines.append(json.dumps({"file_name": f"{name}.png", "texts": [f"a {name} square", name]}))
    (images / "metadata.jsonl").write_text("\n".join(lines))
    short = {"updates": 2, "batch_size": 4, "learning_rate": 1e-3}
    recipe = Recipe.model_validate(
        {
            "name": "squares",
            "conditioning": "text",
            "max_tokens": 8,
            "data": {"path": images, "size": 16},
            "autoencoder": {"channels": [16, 16], "latent_channels": 4, "norm_groups": 8, **short},
            "network": {"channels": [16, 32], "norm_groups": 8, "attention_heads": 2},
            "teacher": short,
            "stage1": short,
            "stage2": {"start": 4, "rounds": [{"steps": 2, **short}, {"steps": 1, "stochastic": True, **short}]},
            "encoder": {"start": 4, "rounds": [{"steps": 2, **short}]},
            "export": {"licence": "CC0-1.0", "steps": [2, 1]},
        }
    )
    run = Run(recipe, tmp_path_factory.mktemp("text-run"), Accelerator(cpu=True))
    distill(run)
    return run


@pytest.fixture(scope="module")
def text_bundle(text_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export(text_run, tmp_path_factory.mktemp("bundles") / "squares", ("fp32",))


def noise(seed: int, run: Run, index: int = 0) -> torch.Tensor:
    return torch.from_numpy(noise_of(seed, run.data.shape, index))[None]


def from_pixels(pixels: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1


def furthest(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_class_bundle_draws_what_torch_draws(digits_run: Run, digits_bundle: Bundle, steps: int) -> None:
    with Pipeline.open(digits_bundle.path) as pipeline:
        images = pipeline.run([Generate("7", steps, 1.5, seed=3), Generate("2", steps, 0.0, seed=4)])
    student = digits_run.denoiser(student_stage(steps))
    condition, w = {"label": torch.tensor([7, 2])}, torch.tensor([1.5, 0.0])
    z = torch.cat([noise(3, digits_run), noise(4, digits_run)])
    expected = to_uint8(sample(student, digits_run.schedule.grid(steps), z, condition, w))
    assert max(furthest(a, b) for a, b in zip(images, expected, strict=True)) <= SMALL_WEIGHTS_TOLERANCE


def test_text_bundle_draws_what_torch_draws(text_run: Run, text_bundle: Bundle) -> None:
    with Pipeline.open(text_bundle.path) as pipeline:
        (image,) = pipeline.run([Generate("a red square", 2, 3.0, seed=9)])
    with torch.inference_mode():
        student = text_run.denoiser(student_stage(2))
        grid, w = text_run.schedule.grid(2), torch.tensor([3.0])
        z = sample(student, grid, noise(9, text_run), context_of("a red square"), w)
        expected = to_uint8(networks.decode(text_run.autoencoder(), z))
    assert furthest(image, expected[0]) <= FP32_TOLERANCE


def test_a_student_from_scratch_runs_in_a_stock_pipeline(text_run: Run) -> None:
    folder = text_run.folder / student_stage(2)
    assert "`from_pretrained(FOLDER, trust_remote_code=True)`" in (folder / "README.md").read_text()
    pipeline = StableDiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    z, words = noise(9, text_run), "a Red square, and many more words than its tokenizer takes"
    images = pipeline(words, latents=z, num_inference_steps=2, guidance_scale=4.0, output_type="pt").images
    with torch.inference_mode():
        student, grid = text_run.denoiser(student_stage(2)), text_run.schedule.grid(2)
        expected = networks.decode(
            text_run.autoencoder(), sample(student, grid, z, context_of(words), torch.tensor([3.0]))
        )
    torch.testing.assert_close(images, (expected / 2 + 0.5).clamp(0, 1), atol=1e-3, rtol=0)


def context_of(words: str) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        (context,) = load_text_encoder()(*tokenize(load_tokenizer(8), [words]))
        return {"context": context}


def test_the_manifest_says_which_samplers_and_encoders_there_are(text_bundle: Bundle) -> None:
    manifest = text_bundle.manifest
    assert (manifest.trained_steps(), manifest.trained_steps("stochastic")) == ((1, 2), (2,))
    assert manifest.encoded_steps() == (2,)
    assert "| encoder-2.onnx | fp32 |" in (text_bundle.path / "README.md").read_text()


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_the_stochastic_sampler_of_a_bundle_is_that_of_torch(
    text_run: Run, text_bundle: Bundle, strength: float
) -> None:
    """Edits and inpaintings: with all steps, an edit starts from noise but for the schedule's last bit of image."""
    square = np.full((16, 16, 3), COLOURS["blue"], np.uint8)
    repaint = np.zeros((16, 16), bool)
    repaint[:8] = True
    steps, start = 2, 2 - int(2 * strength)
    options: dict[str, Any] = {"image": square, "strength": strength, "sampler": "stochastic"}
    with Pipeline.open(text_bundle.path) as pipeline:
        rows = pipeline.prepare(
            [Edit("red", steps, 2.0, 9, **options), Inpaint("red", steps, 2.0, 9, repaint=repaint, **options)]
        )
        while not rows[0].done:
            pipeline.tick(rows)
    latent = networks.encode(text_run.autoencoder(), from_pixels(square)[None])
    grid, z = text_run.schedule.grid(steps), noise(9, text_run)
    keep = torch.ones(1, 1, *latent.shape[2:])
    keep[:, :, : latent.shape[2] // 2] = 0
    for row, kept in zip(rows, (None, Kept(latent, keep, z)), strict=True):
        indices = count(1)
        made = sample_stochastic(
            text_run.denoiser(student_stage(1)), grid, noised(grid, latent, z, start), context_of("red"),
            torch.tensor([2.0]), lambda z, k=indices: noise(9, text_run, next(k)), start=start, kept=kept,
        )  # fmt: skip
        assert (torch.from_numpy(row.z.copy()) - made[0]).abs().max() < LATENT_TOLERANCE


def test_transfer_of_a_bundle_is_that_of_torch(text_run: Run, text_bundle: Bundle) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    with Pipeline.open(text_bundle.path) as pipeline:
        (row,) = pipeline.prepare([Transfer("red", 2, 2.0, 0, picture, "a blue square")])
        assert row.remaining == 4
        while not row.done:
            pipeline.tick([row])
    latent = networks.encode(text_run.autoencoder(), from_pixels(picture)[None])
    grid = text_run.schedule.grid(2)
    encoder, student = (text_run.denoiser(stage(2)) for stage in (encoder_stage, student_stage))
    there = Leg(encoder, grid, context_of("a blue square"), torch.tensor([text_run.recipe.guidance[0]]))
    made = transfer(latent, there, Leg(student, grid, context_of("red"), torch.tensor([2.0])))
    assert (torch.from_numpy(row.z.copy()) - made[0]).abs().max() < LATENT_TOLERANCE


def test_text_bundle_edits_and_repaints(text_bundle: Bundle) -> None:
    square = np.full((16, 16, 3), COLOURS["blue"], np.uint8)
    repaint = np.zeros((16, 16), bool)
    repaint[:8] = True
    with Pipeline.open(text_bundle.path) as pipeline:
        edited, inpainted = pipeline.run(
            [
                Edit("red", 2, 1.0, seed=1, image=square, strength=0.5),
                Inpaint("red", 2, 1.0, seed=1, image=square, repaint=repaint),
            ]
        )
    assert edited.shape == (16, 16, 3)
    assert np.array_equal(inpainted[8:], square[8:])
    assert not np.array_equal(inpainted[:8], square[:8])


def test_data_are_encoded_before_the_autoencoder_goes_to_the_cpu(
    text_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the same one, and the data may be encoded on a GPU."""
    moved: list[str] = []
    encode_all = networks.encode_all
    monkeypatch.setattr(networks, "encode_all", lambda *given: moved.append("encoded") or encode_all(*given))
    monkeypatch.setattr(AutoencoderKL, "cpu", lambda own: moved.append("moved") or own)
    export(Run(text_run.recipe, text_run.folder, Accelerator(cpu=True)), tmp_path / "squares", ("fp32",))
    assert moved[:2] == ["encoded", "moved"]


@pytest.mark.slow
def test_programs_draw_what_the_graphs_draw(text_run: Run, tmp_path: Path) -> None:
    text_bundle = export(text_run, tmp_path / "squares", ("fp32",), programs=True)
    square = np.full((16, 16, 3), COLOURS["blue"], np.uint8)
    tasks = [Generate("a red square", 2, 3.0, seed=9), Edit("red", 2, 1.0, seed=1, image=square, strength=0.5)]
    made = []
    for backend in ("ort", "pytorch"):
        with Pipeline.open(text_bundle.path, backend=backend) as pipeline:
            made.append(pipeline.run(tasks))
    assert max(furthest(a, b) for a, b in zip(*made, strict=True)) <= FP32_TOLERANCE
    assert "| step-2.pt2 | fp32 |" in (text_bundle.path / "README.md").read_text()
    text = text_bundle.graphs()["text.onnx"]
    options = EngineOptions(plans=tmp_path / "plans")
    with open_engine("pytorch", text, options) as program, open_engine("pytorch-aot", text, options) as compiled:
        wait_until_built(compiled)
        assert isinstance(compiled, StandIn)
        assert compiled.state == "built"
        inputs = typical_inputs(text, 3)
        for name, expected in program.run(inputs).items():
            np.testing.assert_allclose(compiled.run(inputs)[name], expected, atol=1e-4)


def test_programs_are_written_when_asked_for(digits_bundle: Bundle, text_bundle: Bundle) -> None:
    programs = {f"step-{steps}.onnx": f"step-{steps}.pt2" for steps in (1, 2, 4)}
    assert digits_bundle.manifest.programs == programs
    assert not text_bundle.manifest.programs
    shown = CliRunner().invoke(fewstep.main, ["inspect", str(digits_bundle.path)]).output
    assert "step-4.onnx as a torch program: step-4.pt2" in shown


def test_the_manifest_tells_where_the_bundle_comes_from(digits_run: Run, digits_bundle: Bundle) -> None:
    manifest = digits_bundle.manifest
    assert manifest.classes == tuple("0123456789")
    assert [student.steps for student in manifest.students] == [1, 2, 4]
    assert (manifest.guidance.minimum, manifest.guidance.maximum) == digits_run.recipe.guidance
    assert any("digits" in attribution.name for attribution in manifest.attributions)
    assert json.loads(manifest.provenance.recipe)["name"] == "tiny-digits"
    card = (digits_bundle.path / "README.md").read_text()
    assert "$" not in card
    assert "CC-BY-4.0" in card
    assert "teacher trained from scratch" in card


def test_a_card_does_not_call_a_checkpoint_trained_from_scratch(digits_run: Run, digits_bundle: Bundle) -> None:
    card = model_card(digits_bundle.manifest, [], digits_run.recipe.export, pictured=False, teacher="someone/model")
    assert "teacher someone/model" in card
    assert "from scratch" not in card
    assert "what its data shows" not in card


def test_a_card_says_its_licence_in_yaml(digits_run: Run, digits_bundle: Bundle) -> None:
    told = digits_bundle.manifest.model_copy(update={"licence": "Other: see LICENSE"})
    card = model_card(told, [], digits_run.recipe.export, pictured=False, teacher=None)
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "Other: see LICENSE"


@pytest.mark.parametrize("has_checker", [True, False])
def test_a_card_says_that_a_bundle_lacks_its_teachers_safety_checker(
    text_run: Run, text_bundle: Bundle, has_checker: bool
) -> None:
    recipe = text_run.recipe.export
    card = model_card(text_bundle.manifest, [], recipe, pictured=False, teacher="x/y", has_checker=has_checker)
    assert ("`FEWSTEP_SAFETY` names a check" in card) == has_checker


def test_a_text_graph_that_reads_otherwise_than_the_encoder_is_not_exported(
    text_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = MiniLMPrompts.encode
    another = lambda self, captions: {name: rows.flip(1) for name, rows in encode(self, captions).items()}  # noqa: E731
    monkeypatch.setattr(MiniLMPrompts, "encode", another)
    with pytest.raises(ExportError, match="read prompts otherwise than the teacher does"):
        export(text_run, tmp_path / "bundle", ("fp32",))


def test_weights_are_stored_small_by_default(digits_bundle: Bundle) -> None:
    assert "fp32" not in digits_bundle.manifest.weights_dtype


def test_a_bundle_is_replaced_only_when_asked(digits_run: Run, digits_bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="exists"):
        export(digits_run, digits_bundle.path)
    assert load_bundle(digits_bundle.path).manifest.revision == digits_bundle.manifest.revision


def test_an_unfinished_run_is_not_exported(digits_run: Run, tmp_path: Path) -> None:
    unfinished = Run(digits_run.recipe, tmp_path / "run", Accelerator(cpu=True))
    with pytest.raises(TrainingError, match="student-4"):
        export(unfinished, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_quality_table_ships(digits_bundle: Bundle, text_bundle: Bundle) -> None:
    assert digits_bundle.manifest.provenance.quality_table == "| KID |"
    assert text_bundle.manifest.provenance.quality_table == ""


def test_the_commit_is_that_of_this_code_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit_of_code() == ""
    (tmp_path / "git").write_text("#!/bin/sh\nprintf 'lib/training/\\n0123456789\\n'")
    (tmp_path / "git").chmod(0o755)
    assert commit_of_code() == ""
    (tmp_path / "git").write_text("#!/bin/sh\nprintf 'training/\\n0123456789\\n'")
    assert commit_of_code() == "0123456789"


@pytest.mark.parametrize(
    ("provenance", "says"),
    [
        ('{"provenance": {"weights": {"student-4": "0"}}}', "not of this student-4"),
        ("{", r"table\.json is damaged"),
        ("[]", r"table\.json is damaged"),
        ('{"provenance": {"weights": 1}}', r"table\.json is damaged"),
    ],
)
def test_a_quality_table_of_other_networks_is_refused(
    digits_run: Run, tmp_path: Path, provenance: str, says: str
) -> None:
    folder = digits_run.folder / "evaluation"
    folder.mkdir()
    try:
        write_table(folder, provenance)
        with pytest.raises(ExportError, match=says):
            export(digits_run, tmp_path / "bundle")
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("text", ["[]", "{", '{"sources": ["me"]}', '{"sources": [{"name": "x", "url": "y"}]}'])
def test_a_faulty_description_of_the_data_is_named_before_any_work(text_run: Run, tmp_path: Path, text: str) -> None:
    assert text_run.recipe.data.path is not None
    description = text_run.recipe.data.path / "dataset.json"
    description.write_text(text)
    try:
        with pytest.raises(ExportError, match=r"dataset\.json"):
            export(text_run, tmp_path / "bundle")
    finally:
        description.unlink()


@pytest.mark.parametrize(
    ("address", "named"),
    [
        ("https://me:secret@host/data/laion?token=secret", "laion"),
        ("s3://key:secret@bucket", "bucket"),
        ("data/laion/", "laion"),
        ("memory://", "shards"),
    ],
)
def test_a_bundle_names_no_more_of_a_stream_than_its_folder(address: str, named: str) -> None:
    run: Any = SimpleNamespace(
        recipe=SimpleNamespace(data=SimpleNamespace(source="stream", address=address)), data=range(3)
    )
    assert data_name(run) == f"{named}, 3 items"
