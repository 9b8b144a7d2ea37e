"""Teachers from pipelines, distilled; their students run by the stock pipelines give our sampler's images."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import (
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from engines.pipeline import Edit, Generate, Inpaint, Pipeline, noise_of
from engines.tasks import Pixels
from tests import pipelines
from training import networks
from training.data.inpainting import masked_condition
from training.distill import distill
from training.draws import Draws
from training.exporting.export import export
from training.guidance import of_rows
from training.losses import teacher_loss
from training.networks import NetworkDenoiser, decode_all, save_network, student_from
from training.pretrained.pipelines import save_pipeline
from training.pretrained.teachers import TeacherError, TeacherPipeline
from training.recipe import Recipe
from training.run import Run
from training.sampler import Kept, noised, sample
from training.stages import student_stage

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (240, 220, 40)}
MAKERS: dict[str, Callable[[Path], Path]] = {
    "sd1": pipelines.stable_diffusion,
    "sd2": lambda folder: pipelines.stable_diffusion(folder, "v_prediction"),
    "inpainting": lambda folder: pipelines.stable_diffusion(folder, in_channels=9),
    "sdxl": pipelines.stable_diffusion_xl,
}
STEPS = (8, 4, 2, 1)
GUIDANCE = (0.0, 1.5, 6.0)
PROMPT = "a red square"
TOLERANCE = 1e-3


def write_squares(folder: Path) -> None:
    folder.mkdir()
    lines = []
    for name, colour in COLOURS.items():
        Image.new("RGB", (pipelines.SIZE, pipelines.SIZE), colour).save(folder / f"{name}.png")
        lines.append(json.dumps({"file_name": f"{name}.png", "texts": [f"a {name} square", name]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """The run of each kind of teacher, distilled from its folder when first asked for."""
    root = tmp_path_factory.mktemp("distilled")
    write_squares(root / "squares")
    made: dict[str, Run] = {}

    def run_of(name: str) -> Run:
        if name not in made:
            checkpoint = MAKERS[name](root / name)
            train_briefly(Run(recipe(checkpoint, root / "squares"), root / f"teacher-{name}", Accelerator(cpu=True)))
            made[name] = Run(recipe(checkpoint, root / "squares"), root / f"run-{name}", Accelerator(cpu=True))
            distill(made[name])
        return made[name]

    return run_of


def train_briefly(run: Run, updates: int = 30) -> None:
    """Teach the checkpoint of a run something of its data: from random weights there is little to distil."""
    assert run.pipeline is not None
    teacher = run.pipeline.denoiser().requires_grad_(True)
    optimiser = torch.optim.AdamW(teacher.parameters(), lr=3e-3)
    for update in range(updates):
        draws = Draws(0, update, range(8))
        batch = run.data.batch(draws.integers(len(run.data)), draws, run.device)
        teacher_loss(teacher, run.schedule, batch, run.null, 0.1, draws).backward()
        optimiser.step()
        optimiser.zero_grad()
    teacher.network.save_pretrained(run.pipeline.folder / "unet")


def recipe(checkpoint: Path, data: Path, **changes: Any) -> Recipe:
    short = {"updates": 4, "batch_size": 4, "learning_rate": 1e-2}
    return Recipe.model_validate(
        {
            "name": "squares",
            "conditioning": "text",
            "guidance": [0, 6],
            "data": {"path": data, "size": pipelines.SIZE},
            "teacher": {"checkpoint": str(checkpoint)},
            "stage1": short,
            "stage2": {"start": 16, "rounds": [{"steps": steps, **short} for steps in STEPS]},
            "export": {"licence": "CC0-1.0", "steps": [4]},
        }
        | changes
    )


class Ours:
    """Our sampler with a student, for one prompt."""

    def __init__(self, run: Run, steps: int, w: float, prompt: str = PROMPT) -> None:
        self.run, self.grid = run, run.schedule.grid(steps)
        self.student, self.autoencoder = run.denoiser(student_stage(steps)), run.autoencoder()
        self.w = torch.tensor([w])
        assert run.prompts is not None
        self.condition = run.prompts.encode([prompt])
        self.condition |= {name: of_rows(value, self.w) for name, value in run.constants.items()}

    def __call__(self, z: Tensor, **options: Any) -> Tensor:
        """The image (1, 3, H, W) in 0..1."""
        z = sample(self.student, self.grid, z, self.condition, self.w, **options)
        return (decode_all(self.autoencoder, z) / 2 + 0.5).clamp(0, 1)


def load(kind: Any, run: Run, steps: int) -> Any:
    pipeline = kind.from_pretrained(run.folder / student_stage(steps), safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(run: Run) -> Tensor:
    return Draws(0, 0, range(1)).normal(torch.empty(1, *run.shape))


def picture(side: int = pipelines.SIZE) -> Tensor:
    """A picture (1, 3, H, W) in 0..1."""
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1))


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(
    ("name", "kind"),
    [("sd1", StableDiffusionPipeline), ("sd2", StableDiffusionPipeline), ("sdxl", StableDiffusionXLPipeline)],
)
def test_text_to_image(runs: Callable[[str], Run], name: str, kind: Any, steps: int) -> None:
    run = runs(name)
    pipeline, start, images, errors = load(kind, run, steps), noise(run), [], []
    for w in GUIDANCE:
        stock = pipeline(
            PROMPT, num_inference_steps=steps, guidance_scale=1 + w, latents=start, output_type="pt",
            height=pipelines.SIZE, width=pipelines.SIZE,
        ).images  # fmt: skip
        images.append(Ours(run, steps, w)(start))
        errors.append(apart(stock, images[-1]))
    assert max(errors) < TOLERANCE
    assert apart(images[0], images[-1]) > 20 * max(errors), "w makes far more of a difference"


@pytest.mark.parametrize(("steps", "strength"), [(8, 0.5), (4, 0.75), (2, 0.5), (1, 1.0)])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sd1", StableDiffusionImg2ImgPipeline),
        ("sd2", StableDiffusionImg2ImgPipeline),
        ("sdxl", StableDiffusionXLImg2ImgPipeline),
    ],
)
def test_image_to_image(runs: Callable[[str], Run], name: str, kind: Any, steps: int, strength: float) -> None:
    run, image = runs(name), picture()
    pipeline, start = load(kind, run, steps), steps - int(steps * strength)
    for w in GUIDANCE:
        stock = pipeline(
            PROMPT, image=image, strength=strength, num_inference_steps=steps, guidance_scale=1 + w, output_type="pt",
            generator=torch.Generator().manual_seed(5),
        ).images  # fmt: skip
        ours, generator = Ours(run, steps, w), torch.Generator().manual_seed(5)
        torch.randn(1, *run.shape, generator=generator)  # what the pipeline draws for the image's latent
        latent = networks.encode(ours.autoencoder, 2 * image - 1)
        z = noised(ours.grid, latent, torch.randn(1, *run.shape, generator=generator), start)
        assert apart(stock, ours(z, start=start)) < TOLERANCE, f"w = {w}"


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sd1", StableDiffusionInpaintPipeline),
        ("sd2", StableDiffusionInpaintPipeline),
        ("inpainting", StableDiffusionInpaintPipeline),
        ("sdxl", StableDiffusionXLInpaintPipeline),
    ],
)
def test_inpainting(runs: Callable[[str], Run], name: str, kind: Any, steps: int) -> None:
    """A network of four channels has the kept region put back; one of nine sees it."""
    run, image = runs(name), picture()
    pipeline, start = load(kind, run, steps), noise(run)
    mask = torch.zeros(1, 1, pipelines.SIZE, pipelines.SIZE)
    mask[..., : pipelines.SIZE // 2, 4:] = 1
    for w in GUIDANCE:
        stock = pipeline(
            PROMPT, image=image, mask_image=mask, num_inference_steps=steps, guidance_scale=1 + w, latents=start,
            strength=1.0, output_type="pt", height=pipelines.SIZE, width=pipelines.SIZE,
        ).images  # fmt: skip
        ours = Ours(run, steps, w)
        given = masked_condition(ours.autoencoder, 2 * image - 1, mask)
        kept = None
        if name == "inpainting":
            ours.condition |= given
        else:
            kept = Kept(networks.encode(ours.autoencoder, 2 * image - 1), 1 - given["mask"], start)
        assert apart(stock, ours(start, kept=kept)) < TOLERANCE, f"w = {w}"


@pytest.mark.parametrize("name", ["sd1", "inpainting", "sdxl"])
def test_stage_1_and_every_round_have_their_rows(runs: Callable[[str], Run], name: str) -> None:
    stage1, *rows = json.loads((runs(name).folder / "rounds.json").read_text())
    assert stage1["stage"] == "stage1"
    assert stage1["steps"] == runs(name).recipe.stage2.start
    assert [row["steps"] for row in rows] == list(STEPS)
    for row in (stage1, *rows):
        assert 0 < row["to_its_teacher"] < 10
        assert row["updates"] == row["kept"]
    assert {row["updates"] for row in rows} == {4}
    assert "student-4" in (runs(name).folder / "rounds.md").read_text()


@pytest.fixture(scope="module")
def bundles(
    runs: Callable[[str], Run], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Pipeline]]:
    """The bundle of each kind of teacher's students, open on ONNX Runtime."""
    root, opened = tmp_path_factory.mktemp("bundles"), dict[str, Pipeline]()

    def bundle_of(name: str) -> Pipeline:
        if name not in opened:
            opened[name] = Pipeline.open(export(runs(name), root / name, ("fp32",)).path)
        return opened[name]

    yield bundle_of
    for pipeline in opened.values():
        pipeline.close()


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [PROMPT, "a blue! circle!!"])
@pytest.mark.parametrize("name", ["inpainting", "sd1", "sdxl"])
def test_a_bundle_makes_our_samplers_images(
    runs: Callable[[str], Run], bundles: Callable[[str], Pipeline], name: str, prompt: str
) -> None:
    """From the prompt to the image, by ONNX Runtime and without torch. SDXL's encoders read "!" in two ways."""
    run = runs(name)
    (image,) = bundles(name).run([Generate(prompt, steps=4, guidance=1.5, seed=3)])
    start = torch.from_numpy(noise_of(3, run.shape))[None]
    assert off(image, Ours(run, 4, 1.5, prompt)(start)) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inpainting", "sdxl"])
def test_a_bundle_edits_as_our_sampler_does(
    runs: Callable[[str], Run], bundles: Callable[[str], Pipeline], name: str
) -> None:
    run, pixels = runs(name), as_pixels(picture())
    task = Edit(PROMPT, steps=4, guidance=1.5, seed=3, image=pixels, strength=0.5)
    (image,) = bundles(name).run([task])
    ours = Ours(run, 4, 1.5)
    latent = networks.encode(ours.autoencoder, as_tensor(pixels))
    z = noised(ours.grid, latent, torch.from_numpy(noise_of(3, run.shape))[None], 2)
    assert off(image, ours(z, start=2)) <= 1


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_bundle_shows_an_inpainting_network_the_mask(
    runs: Callable[[str], Run], bundles: Callable[[str], Pipeline], strength: float
) -> None:
    """In a batch with others, which see that all is masked."""
    run, pixels = runs("inpainting"), as_pixels(picture())
    repaint = np.zeros((pipelines.SIZE, pipelines.SIZE), np.bool_)
    repaint[: pipelines.SIZE // 2, 4:] = True
    inpaint = Inpaint(PROMPT, steps=4, guidance=1.5, seed=3, image=pixels, repaint=repaint, strength=strength)
    image, made = bundles("inpainting").run([inpaint, Generate(PROMPT, steps=4, guidance=1.5, seed=3)])
    ours = Ours(run, 4, 1.5)
    start, noise_3 = 4 - int(4 * strength), torch.from_numpy(noise_of(3, run.shape))[None]
    latent = networks.encode(ours.autoencoder, as_tensor(pixels))
    mask = torch.from_numpy(repaint)[None, None].float()
    ours.condition |= masked_condition(ours.autoencoder, as_tensor(pixels), mask)
    begun = noised(ours.grid, latent, noise_3, start) if start else noise_3  # as the stock pipeline does
    painted = ours(begun, start=start)
    expected = np.where(repaint[..., None], rounded(painted), pixels)
    assert abs(image.astype(int) - expected).max() <= 1
    assert (image[~repaint] == pixels[~repaint]).all()
    assert abs(image.astype(int) - made.astype(int))[repaint].max() > 3, "the mask makes a difference"


def as_pixels(image: Tensor) -> Pixels:
    return rounded(image).astype(np.uint8)


def as_tensor(pixels: Pixels) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1


def rounded(image: Tensor) -> NDArray[np.float32]:
    return np.asarray(image[0].permute(1, 2, 0).mul(255).round().numpy(), np.float32)


def off(image: Pixels, ours: Tensor) -> float:
    return float(abs(image - rounded(ours)).max())


def test_every_student_says_how_it_is_run(runs: Callable[[str], Run]) -> None:
    for steps in STEPS:
        card = (runs("sd1").folder / student_stage(steps) / "README.md").read_text()
        assert f"num_inference_steps={steps}" in card
        assert "`guidance_scale` of 1 to 7" in card


def test_a_pipeline_makes_several_images_and_heeds_no_negative_prompt(runs: Callable[[str], Run]) -> None:
    run = runs("sd1")
    pipeline, start = load(StableDiffusionPipeline, run, 2), Draws(0, 0, range(4)).normal(torch.empty(4, *run.shape))
    stock = pipeline(
        ["a red square", "a blue circle"], negative_prompt=["green"] * 2, num_images_per_prompt=2, output_type="pt",
        num_inference_steps=2, guidance_scale=2.5, latents=start, height=pipelines.SIZE, width=pipelines.SIZE,
    ).images  # fmt: skip
    assert run.prompts is not None
    context = run.prompts.encode(["a red square"] * 2 + ["a blue circle"] * 2)
    z = sample(run.denoiser(student_stage(2)), run.schedule.grid(2), start, context, torch.full((4,), 1.5))
    assert apart(stock, (decode_all(run.autoencoder(), z) / 2 + 0.5).clamp(0, 1)) < TOLERANCE


def test_a_teacher_without_its_safety_checker_gives_students_without_one(tmp_path: Path) -> None:
    write_squares(tmp_path / "squares")
    checkpoint = pipelines.stable_diffusion(tmp_path / "sd")
    index = checkpoint / "model_index.json"
    named = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    index.write_text(json.dumps(json.loads(index.read_text()) | named))
    run = Run(recipe(checkpoint, tmp_path / "squares"), tmp_path / "run", Accelerator(cpu=True))
    (run.folder / "student-1").mkdir()
    run.finish("student-1", run.denoiser("teacher"))
    assert StableDiffusionPipeline.from_pretrained(run.folder / "student-1").safety_checker is None


@pytest.mark.parametrize("complete", [True, False])
def test_students_have_the_safety_checker_of_a_teacher_that_has_all_it_needs(tmp_path: Path, complete: bool) -> None:
    checkpoint, student = pipelines.stable_diffusion(tmp_path / "sd"), tmp_path / "student"
    pipelines.add_safety_checker(checkpoint, with_extractor=complete)
    opened = TeacherPipeline.open(str(checkpoint))
    assert opened.has_safety_checker
    denoiser = student_from(opened.denoiser())
    save_network(denoiser, student / "unet")
    save_pipeline(student, denoiser, opened, max_tokens=8)
    pipeline = StableDiffusionPipeline.from_pretrained(student)
    assert (pipeline.safety_checker is not None) == complete
    assert pipeline.config["requires_safety_checker"] == complete


def test_a_run_of_weights_of_a_variant_that_is_not_named_claims_nothing(tmp_path: Path) -> None:
    write_squares(tmp_path / "squares")
    checkpoint, folder = pipelines.stable_diffusion(tmp_path / "sd"), tmp_path / "run"
    for weights in checkpoint.rglob("*.safetensors"):
        weights.rename(weights.with_suffix(".fp16.safetensors"))
    with pytest.raises(TeacherError, match="its unet has weights of the variant fp16 only: name it as variant"):
        Run(recipe(checkpoint, tmp_path / "squares"), folder, Accelerator(cpu=True))
    teacher = {"checkpoint": str(checkpoint), "variant": "fp16"}
    run = Run(recipe(checkpoint, tmp_path / "squares", teacher=teacher), folder, Accelerator(cpu=True))
    assert run.denoiser("teacher").prediction == "eps"


def test_a_student_of_sdxl_says_how_it_inpaints(tmp_path: Path) -> None:
    write_squares(tmp_path / "squares")
    checkpoint = pipelines.stable_diffusion_xl(tmp_path / "sdxl")
    run = Run(recipe(checkpoint, tmp_path / "squares"), tmp_path / "run", Accelerator(cpu=True))
    (run.folder / "student-1").mkdir()
    run.finish("student-1", run.denoiser("teacher"))
    assert "`strength=1.0`: StableDiffusionXLInpaintPipeline" in (run.folder / "student-1" / "README.md").read_text()


def test_a_student_may_be_saved_over_itself_and_leaves_its_teacher_as_it_was(tmp_path: Path) -> None:
    checkpoint, student = pipelines.stable_diffusion(tmp_path / "sd"), tmp_path / "student"
    before = {file: file.read_bytes() for file in checkpoint.rglob("*") if file.is_file()}
    opened = TeacherPipeline.open(str(checkpoint))
    denoiser = opened.denoiser()
    save_network(denoiser, student / "unet")
    save_pipeline(student, denoiser, opened, max_tokens=8)
    StableDiffusionPipeline.from_pretrained(student, dtype=torch.float16).save_pretrained(student)
    assert {file: file.read_bytes() for file in before} == before


@pytest.mark.parametrize("name", [["pipeline", "Custom"], "StableDiffusionControlNetPipeline"])
def test_students_are_of_the_stock_pipeline_whatever_their_teacher_is(tmp_path: Path, name: Any) -> None:
    checkpoint, student = pipelines.stable_diffusion(tmp_path / "sd"), tmp_path / "student"
    index = json.loads((checkpoint / "model_index.json").read_text())
    index |= {"_class_name": name, "controlnet": ["diffusers", "ControlNetModel"], "thing": ["pipeline", "Thing"]}
    (checkpoint / "model_index.json").write_text(json.dumps(index))
    opened = TeacherPipeline.open(str(checkpoint))
    denoiser = opened.denoiser()
    save_network(denoiser, student / "unet")
    save_pipeline(student, denoiser, opened, max_tokens=8)
    assert type(DiffusionPipeline.from_pretrained(student)) is StableDiffusionPipeline
    assert "controlnet" not in json.loads((student / "model_index.json").read_text())


def test_a_students_parts_may_be_in_several_files_of_a_variant(tmp_path: Path) -> None:
    checkpoint = pipelines.stable_diffusion(tmp_path / "sd")
    whole = StableDiffusionPipeline.from_pretrained(checkpoint)
    for part in ("vae", "text_encoder"):
        next((checkpoint / part).glob("*.safetensors")).unlink()
        getattr(whole, part).save_pretrained(checkpoint / part, variant="fp16", max_shard_size="20KB")
        assert len(list((checkpoint / part).glob("*-of-*"))) > 1
    opened = TeacherPipeline.open(str(checkpoint), variant="fp16")
    denoiser = opened.denoiser()  # of which there is no such variant
    save_network(denoiser, tmp_path / "student" / "unet")
    save_pipeline(tmp_path / "student", denoiser, opened, max_tokens=8)
    student = StableDiffusionPipeline.from_pretrained(tmp_path / "student")
    for part in ("vae", "text_encoder"):
        ours, theirs = getattr(student, part).state_dict(), getattr(whole, part).state_dict()
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_students_of_another_size_than_their_teacher_make_images_of_theirs(tmp_path: Path) -> None:
    write_squares(tmp_path / "squares")
    checkpoint = pipelines.stable_diffusion(tmp_path / "sd", sample_size=2 * pipelines.SIZE // 8)
    run = Run(recipe(checkpoint, tmp_path / "squares"), tmp_path / "run", Accelerator(cpu=True))
    (run.folder / "student-1").mkdir()
    run.finish("student-1", run.denoiser("teacher"))
    config = json.loads((run.folder / "student-1" / "unet" / "config.json").read_text())
    assert config["sample_size"] == run.shape[-1]


def test_a_students_parts_are_those_of_the_variant_where_plain_ones_lie_beside_them(tmp_path: Path) -> None:
    checkpoint = pipelines.stable_diffusion(tmp_path / "sd")
    for part in ("vae", "text_encoder"):
        plain = next((checkpoint / part).glob("*.safetensors"))
        plain.rename(plain.with_suffix(".fp16.safetensors"))
        plain.write_bytes(b"another")
        plain.with_suffix(".bin").write_bytes(b"another")
    opened = TeacherPipeline.open(str(checkpoint), variant="fp16")
    save_pipeline(tmp_path, NetworkDenoiser(pipelines.unet(), opened.schedule), opened, max_tokens=8)
    for part in ("vae", "text_encoder"):
        weights = [file for file in (tmp_path / part).iterdir() if file.suffix != ".json"]
        assert [file.suffix for file in weights] == [".safetensors"]
        assert weights[0].read_bytes() != b"another"
        assert (tmp_path / part / "config.json").exists()


@pytest.mark.parametrize(
    ("make", "kind"),
    [(pipelines.stable_diffusion, StableDiffusionPipeline), (pipelines.stable_diffusion_xl, StableDiffusionXLPipeline)],
)
def test_students_of_a_teacher_in_half_precision_run_as_they_are(
    tmp_path: Path, make: Callable[[Path], Path], kind: Any
) -> None:
    """Their networks are in full precision, and so is what stands beside them, if its weights are half as long."""
    half, student = tmp_path / "half", tmp_path / "student"
    kind.from_pretrained(make(tmp_path / "whole")).to(torch.float16).save_pretrained(half)
    opened = TeacherPipeline.open(str(half))
    denoiser = student_from(opened.denoiser())
    save_network(denoiser, student / "unet")
    for _ in range(2):  # as after a stage that was killed: what is replaced is the teacher's too
        save_pipeline(student, denoiser, opened, max_tokens=8)
    pipeline = kind.from_pretrained(student)
    pipeline.set_progress_bar_config(disable=True)
    models = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    assert {name: part.dtype for name, part in models.items()} == dict.fromkeys(models, torch.float32)
    images = pipeline(PROMPT, num_inference_steps=1, guidance_scale=3, output_type="pt", height=32, width=32).images
    assert images.isfinite().all()
    for part in (name for name in models if name.startswith("text_encoder")):
        assert json.loads((half / part / "config.json").read_text())["dtype"] == "float16"
        assert (student / part / "model.safetensors").samefile(half / part / "model.safetensors")
