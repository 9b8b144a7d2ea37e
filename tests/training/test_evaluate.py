"""The quality table on a tiny untrained run: what is compared with what, and that nothing is measured twice."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

from tests.training.evaluations import RECIPE, SIZE, invoke, make_captioned_run, make_digits_run, write_squares
from training.errors import TrainingError
from training.evaluation import candidates, judge
from training.evaluation.candidates import Candidate, ImageMaker, trained_students
from training.evaluation.command import evaluate as command
from training.evaluation.evaluate import Plan, evaluate, make_images
from training.evaluation.evaluation_set import EvaluationSet, load_evaluation_set
from training.evaluation.features import PixelFeatures, Pixels
from training.evaluation.judge import Judge
from training.networks import save_network
from training.recipe import Recipe
from training.run import NETWORK, Run
from training.solvers import Solver
from training.stages import student_stage
from training.store import Store

TEACHER, STUDENT = Candidate("teacher", 4), Candidate("student", 4)
QUICK = [
    *("--features", "pixels", "--frechet-dims", "6", "--samples", "24"),
    *("--teacher-steps", "5,4", "--guidance", "0,2"),
]


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_digits_run(tmp_path_factory.mktemp("evaluate"))


@pytest.fixture
def folder(made_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made_once, tmp_path / "work"))


@pytest.fixture
def run(folder: Path) -> Run:
    return Run(Recipe.load(folder / "tiny.toml"), folder / "run", Accelerator(cpu=True))


def some(run: Run, samples: int = 24, split: str = "train", seed: int = 0) -> EvaluationSet:
    return load_evaluation_set(run, split, samples, seed)


def maker(run: Run, samples: int = 24, seed: int = 0) -> ImageMaker:
    return ImageMaker(run, some(run, samples), seed, Store(run.folder / "evaluation"))


def count_batches(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[int]:
    """Count the rows of every batch that is sampled; raise KeyboardInterrupt in place of one too many."""
    made: list[int] = []
    original = candidates.sample_with

    def counted(sampler: Solver, *arguments: Any) -> Tensor:
        if len(made) == stop_after:
            raise KeyboardInterrupt
        made.append(len(arguments[3]))
        return original(sampler, *arguments)

    monkeypatch.setattr(candidates, "sample_with", counted)
    return made


def test_the_command_prints_and_keeps_the_table(folder: Path) -> None:
    result = invoke(folder, *QUICK)
    assert result.exit_code == 0, result.output
    kept = folder / "run" / "evaluation"
    assert (kept / "table.md").read_text() in result.stdout
    lines = [line for line in result.stdout.splitlines() if line.startswith("| ")]
    kid = lines[:9]
    assert kid[0] == "| model | sampler | steps | network calls | s/image | w = 0 | w = 2 |"
    assert [line.split(" | ")[:4] for line in kid[2:8]] == [
        ["| teacher", "DDIM", "5", "10"],
        ["| teacher", "DDIM", "4", "8"],
        ["| teacher", "DPM-Solver++ (2M)", "4", "8"],
        ["| teacher", "UniPC", "4", "8"],
        ["| student", "its own steps", "4", "4"],
        ["| student", "its own steps", "2", "2"],
    ]
    assert kid[8].startswith("| real images (floor) |")
    with Image.open(kept / "samples.png") as picture:
        assert picture.size == (10 * SIZE * 2, 7 * SIZE * 2)
    for name in ("quality-calls.png", "quality-guidance.png"):
        with Image.open(kept / name) as picture:
            assert picture.width > 900


def test_images_that_are_not_finite_are_an_error_and_not_black(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "sample_with", lambda *arguments: arguments[4] * torch.nan)
    with pytest.raises(TrainingError, match="student, 2 steps at w = 1: its images have values that are not finite"):
        maker(run).make(Candidate("student", 2), 1.0, range(2))


def test_the_solvers_that_are_named_are_the_ones_of_fewer_steps(folder: Path) -> None:
    result = invoke(folder, *QUICK, "--solvers", "unipc", "--steps", "2")
    assert result.exit_code == 0, result.output
    lines = [line.split(" | ")[:3] for line in result.stdout.splitlines() if line.startswith(("| teacher", "| stud"))]
    assert lines[:3] == [["| teacher", "DDIM", "5"], ["| teacher", "UniPC", "4"], ["| student", "its own steps", "2"]]
    assert "--solvers unipc" in result.stdout


def test_the_files_hold_every_figure_with_what_it_depends_on(folder: Path) -> None:
    assert invoke(folder, *QUICK, "--seed", "3").exit_code == 0
    kept = folder / "run" / "evaluation"
    quality = json.loads((kept / "table.json").read_text())
    about = quality["provenance"]
    assert about["images"] == about["floor_images"] == 24
    assert about["split"] == "train"
    assert about["reference_images"] == 809
    assert about["seed"] == 3
    assert about["frechet_dims"] == 6
    assert about["extractor"] == PixelFeatures().identity
    assert set(about["weights"]) == {"teacher", "student-4", "student-2"}
    assert str(folder) not in json.dumps(quality)
    with (kept / "table.csv").open() as file:
        lines = list(csv.DictReader(file))
    candidates_of_lines = [(line["model"], line["sampler"], line["steps"], line["w"]) for line in lines]
    assert candidates_of_lines == [
        ("teacher", "ddim", "5", "0.0"), ("teacher", "ddim", "5", "2.0"),
        ("teacher", "ddim", "4", "0.0"), ("teacher", "ddim", "4", "2.0"),
        ("teacher", "dpm-solver++", "4", "0.0"), ("teacher", "dpm-solver++", "4", "2.0"),
        ("teacher", "unipc", "4", "0.0"), ("teacher", "unipc", "4", "2.0"),
        ("student", "ddim", "4", "0.0"), ("student", "ddim", "4", "2.0"),
        ("student", "ddim", "2", "0.0"), ("student", "ddim", "2", "2.0"),
        ("real images", "", "", ""),
    ]  # fmt: skip
    for name in ("kid", "frechet", "precision", "recall"):
        assert float(lines[2][name]) == quality["rows"][1]["cells"][0]["figures"][name]
    assert {line["extractor"] for line in lines} == {PixelFeatures().identity}
    assert {line["split"] for line in lines} == {"train"}
    assert {line["fid"] for line in lines} == {line["clip_score"] for line in lines} == {""}
    assert all(float(line["seconds_per_image"]) > 0 for line in lines[:-1])
    assert [line["psnr_db"] == "" for line in lines] == [True, True, *[False] * 10, True]


def test_a_student_that_equals_the_teacher_has_its_figures(run: Run) -> None:
    """Without guidance; so teacher and student have the same grid, noise and conditions."""
    quality = evaluate(maker(run), PixelFeatures(), Plan((TEACHER, STUDENT), (0.0, 2.0), frechet_dims=6))
    teacher, student = quality.rows
    assert student.cells[0].figures.frechet == pytest.approx(teacher.cells[0].figures.frechet, rel=1e-3)
    assert student.cells[0].rmse == pytest.approx(0, abs=1e-3)
    assert student.cells[1].rmse is not None
    assert student.cells[1].rmse > 0.01


def test_real_images_are_at_the_floor_and_noise_is_far_above(run: Run) -> None:
    data = some(run, 200)
    judge = Judge(data, PixelFeatures(), 16, 0, Store(run.folder / "evaluation"))
    floor = judge(data.images)
    noise = judge(np.random.default_rng(0).integers(0, 256, data.images.shape, np.uint8))
    assert abs(floor.kid) < 3 * floor.kid_deviation
    assert noise.kid > 10 * floor.kid_deviation
    assert noise.frechet > 10 * floor.frechet
    assert min(floor.precision, floor.recall) > 0.7
    assert noise.recall == 0
    assert floor.manifold_images == noise.manifold_images == 200


def test_a_stopped_evaluation_goes_on_where_it_was(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "rows_at_once", lambda shape: 10)
    plan = Plan((TEACHER, STUDENT), (0.0, 2.0), frechet_dims=6)
    with monkeypatch.context() as patch:
        count_batches(patch, stop_after=5)
        with pytest.raises(KeyboardInterrupt):
            make_images(maker(run), plan)
    left = count_batches(monkeypatch)
    make_images(maker(run), plan)
    assert left == [4, 10, 10, 4, 10, 10, 4]
    resumed = [maker(run).images(candidate, w) for w, candidate in plan.places]
    shutil.rmtree(run.folder / "evaluation")
    assert np.array_equal(resumed, [maker(run).images(candidate, w) for w, candidate in plan.places])


def test_a_repeated_evaluation_only_prints(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = invoke(folder, *QUICK)

    def refuse(*_: object) -> None:
        raise AssertionError("measured again")

    for owner, name in (
        (Run, "denoiser"), (Run, "guided_teacher"), (PixelFeatures, "__call__"), (judge, "kernel_distance"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, refuse)
    again = invoke(folder, *QUICK)
    assert again.exit_code == 0, again.output
    assert again.stdout == first.stdout


def test_more_samples_extend_the_images_and_other_weights_replace_them(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "rows_at_once", lambda shape: 30)
    made = count_batches(monkeypatch)
    few = maker(run, 30).images(STUDENT, 1.0)
    more = maker(run, 36).images(STUDENT, 1.0)
    assert made == [30, 6]
    assert np.array_equal(more[:30], few)
    assert maker(run).missing_calls(STUDENT, 1.0) == 24 * 4
    student = run.denoiser(student_stage(4))
    torch.nn.init.normal_(student.network.conv_out.weight)
    save_network(student, run.folder / student_stage(4) / NETWORK)
    assert not np.array_equal(maker(run, 30).images(STUDENT, 1.0), few)


def test_the_noise_of_an_image_depends_on_seed_and_place_only(run: Run) -> None:
    whole = maker(run).make(STUDENT, 1.0, range(24)).astype(int)
    assert np.abs(maker(run).make(STUDENT, 1.0, range(5, 9)) - whole[5:9]).max() <= 1
    other = maker(run)
    other.seed = 1
    assert np.abs(other.make(STUDENT, 1.0, range(5, 9)) - whole[5:9]).max() > 1


def test_images_of_another_arithmetic_are_others(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a CPU in fp32 keep the key that they always had."""
    key = maker(run)._key(STUDENT, 1.0, range(24))
    assert key["precision"] == "fp32"
    on_gpu = maker(run)
    monkeypatch.setattr(Run, "device", torch.device("cuda"))
    monkeypatch.setattr("torch.backends.cudnn.allow_tf32", True)
    assert on_gpu._key(STUDENT, 1.0, range(24)) != key
    monkeypatch.setattr("torch.backends.cudnn.allow_tf32", False)
    assert on_gpu._key(STUDENT, 1.0, range(24)) == key


def images_of(pixels: Pixels) -> set[bytes]:
    return {image.tobytes() for image in pixels}


def test_conditions_and_reference_share_no_image(run: Run) -> None:
    data = some(run, 700)
    assert len(data) == len(data.images) == 700
    everything = load_evaluation_set(run, "train", 808, 0)
    assert len(everything.images) + len(everything.reference) == 1617
    # The digits hold a few images twice.
    assert len(images_of(data.images) & images_of(data.reference)) < 5
    heldout = some(run, 100, "heldout")
    assert len(heldout.reference) == 1617
    assert "heldout" in heldout.description
    assert heldout.words == tuple(str(int(label)) for label in heldout.condition["label"])
    assert some(run, 10).words == data.words[:10]
    assert some(run, 24, seed=1).words != data.words[:24]


def test_conditions_are_used_again_in_another_order_each_time(run: Run) -> None:
    once = some(run, 808)
    data = some(run, 2000)
    assert len(data) == 2000
    assert np.array_equal(data.images, once.images)
    first, second, rest = data.words[:808], data.words[808:1616], data.words[1616:]
    assert first == once.words
    assert sorted(second) == sorted(first)
    assert second != first
    assert rest != second[: len(rest)]
    assert data.words == tuple(str(int(label)) for label in data.condition["label"])
    assert some(run, 2000).words == data.words
    assert some(run, 2000, seed=1).words[808:] != data.words[808:]


def test_more_samples_than_images_are_made_from_other_noise_and_counted(folder: Path) -> None:
    run = Run(Recipe.load(folder / "tiny.toml"), folder / "run", Accelerator(cpu=True))
    fast = Candidate("student", 2)
    quality = evaluate(maker(run, 850), PixelFeatures(), Plan((Candidate("teacher", 1), fast), (0.0,), frechet_dims=6))
    assert (quality.provenance.images, quality.provenance.floor_images) == (850, 808)
    figures = quality.rows[1].cells[0].figures
    assert figures.manifold_images == 809
    assert quality.floor.manifold_images == 808
    made = maker(run, 850)
    label = made.data.condition["label"]
    again = next(i for i in range(808, 850) if label[i] == label[0])
    assert not np.array_equal(made.images(fast, 0.0)[again], made.images(fast, 0.0)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "8"], "no trained student of 8 steps; it has 4, 2"),
        (["--steps", "4,x"], "not a list of numbers"),
        (["--steps", "0"], "not at least 1"),
        (["--teacher-steps", "2000"], "2000 steps cannot be taken on 1024 timesteps"),
        (["--guidance", "0,5"], "w = 5 is outside the students' trained range, 0 to 4"),
        (["--guidance", "nan"], "not at least 0"),
        (["--picture-guidance", "1"], "not among the values of w, 0, 2"),
        (["--samples", "1"], "1 is not in the range x>=2"),
        (["--solvers", "ddim,euler"], "'euler' is not one of ddim, dpm-solver++, unipc"),
        (["--solvers", "unipc", "--teacher-steps", "3"], "unipc samples the teacher at fewer steps than the most"),
        (["--inception", "missing.pth"], "'missing.pth' does not exist"),
        (["--inception", __file__], "SHA-256 begins with"),
        (["--clip", "missing"], "'missing' does not exist"),
        (["--clip", str(Path(__file__).parent)], "this recipe's conditions are classes"),
        (["--samples", "6"], "6 dimensions cannot be had from 6 and 809 images"),
        (["--split", "test"], 'no split "test"'),
        (["--features", "inception"], "'inception' is not one of"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_made(
    folder: Path, options: Sequence[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = count_batches(monkeypatch)
    result = invoke(folder, *QUICK, *options)
    assert result.exit_code in (1, 2)
    assert message in " ".join(result.output.split())
    assert made == []


def test_a_folder_without_a_run_is_refused_and_not_made(folder: Path) -> None:
    missing = folder / "other"
    result = CliRunner().invoke(command, [str(folder / "tiny.toml"), "--run", str(missing)])
    assert result.exit_code == 1
    assert "there is no run in" in result.output
    assert not missing.exists()
    Run(Recipe.load(folder / "tiny.toml"), missing, Accelerator(cpu=True))
    result = CliRunner().invoke(command, [str(folder / "tiny.toml"), "--run", str(missing)])
    assert "no trained teacher" in result.output


def test_a_disk_that_takes_nothing_is_one_line(folder: Path) -> None:
    (folder / "run" / "evaluation").write_text("in the way")
    result = invoke(folder, *QUICK)
    assert result.exit_code == 1
    assert result.output.splitlines()[-1].startswith("Error: [Errno")


def test_students_that_are_not_trained_yet_are_left_out(run: Run) -> None:
    assert trained_students(run) == (4, 2)


def test_a_student_takes_no_other_steps_than_its_own() -> None:
    with pytest.raises(ValueError, match=r"does not take the steps of dpm-solver\+\+"):
        Candidate("student", 4, "dpm-solver++")


def test_text_and_latents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captions of an imagefolder, drawn one for each image; latents decoded to the recipe's size."""
    folder = make_captioned_run(tmp_path, monkeypatch)
    options = ["--features", "pixels", "--teacher-steps", "3", "--guidance", "1", "--frechet-dims", "4"]
    result = invoke(folder, *options, "--samples", "20", "--data", str(folder / "set"))
    assert result.exit_code == 0, result.output
    assert "20 generated images" in result.stdout
    assert "a red square" in result.stdout
    assert "autoencoder" in (folder / "run" / "evaluation" / "table.json").read_text()
    write_squares(folder / "other", 30)
    result = invoke(folder, *options, "--samples", "20", "--data", str(folder / "other"))
    assert result.exit_code == 1
    assert "was begun with other images" in result.stderr
    result = invoke(folder, *options, "--samples", "20", "--images", str(folder / "other"))
    assert result.exit_code == 0, result.output


def test_a_stochastic_student_has_a_row_with_twice_the_calls(tmp_path: Path) -> None:
    text = RECIPE.replace("{ steps = 2, updates", "{ steps = 2, stochastic = true, updates")
    make_digits_run(tmp_path, text)
    options = ("--features", "pixels", "--teacher-steps", "3", "--guidance", "1", "--frechet-dims", "4")
    result = invoke(tmp_path, *options, "--samples", "20")
    assert result.exit_code == 0, result.output
    lines = [[cell.strip() for cell in line.split("|")] for line in result.stdout.splitlines() if "| student |" in line]
    assert {tuple(line[3:5]) for line in lines if line[2] == "stochastic"} == {("4", "4")}


def test_the_stochastic_sampler_makes_the_same_images_again(run: Run) -> None:
    noisy = Candidate("student", 8, "stochastic")
    assert noisy.stage == student_stage(4)
    first, again = (maker(run).make(noisy, 1.0, range(6)) for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, maker(run).make(STUDENT, 1.0, range(6)))
