"""Both stages on real digits: the students beat their own teacher at equal steps; stages are kept and resumed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from training import distill
from training.diffusion import Schedule, diffuse, x_from_v
from training.draws import Draws, generator_at
from training.errors import TrainingError
from training.guidance import Condition, Denoiser
from training.losses import Batch, stochastic_step, target_along
from training.mixture import ExactDenoiser, GaussianMixture
from training.networks import student_from
from training.recipe import Recipe
from training.rounds import ROWS as TRIAL_ROWS
from training.rounds import Trial
from training.run import NETWORK, Run
from training.sampler import sample
from training.stages import student_stage

EXACT_STEPS = 64
ROWS = 128


def draw(run: Run, denoiser: Denoiser, steps: int) -> Tensor:
    """Digits of every class and of w over the range, from the same noise for every denoiser."""
    noise = torch.randn(ROWS, *run.data.shape, generator=generator_at(1, 0))
    condition = {"label": torch.arange(ROWS) % 10}
    w = torch.linspace(*run.recipe.guidance, ROWS)
    return sample(denoiser, run.schedule.grid(steps), noise, condition, w)


@pytest.fixture(scope="module")
def exact(digits_run: Run) -> Tensor:
    """What the teacher draws in many steps."""
    return draw(digits_run, digits_run.guided_teacher(), EXACT_STEPS)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("steps", "closer"), [(2, 1.3), (1, 3.0)])
def test_students_beat_the_guided_teacher_at_equal_steps(
    digits_run: Run, exact: Tensor, steps: int, closer: float
) -> None:
    """Against the teacher's own many-step images at equal noise, condition and w."""
    student_error = distance(draw(digits_run, digits_run.denoiser(student_stage(steps)), steps), exact)
    teacher_error = distance(draw(digits_run, digits_run.guided_teacher(), steps), exact)
    assert student_error * closer < teacher_error


@pytest.mark.parametrize(("calls", "closer"), [(4, 1.5), (2, 3.0)])
def test_students_beat_the_guided_teacher_at_equal_network_calls(
    digits_run: Run, exact: Tensor, calls: int, closer: float
) -> None:
    """Guidance costs the teacher two calls a step, and a student one."""
    student_error = distance(draw(digits_run, digits_run.denoiser(student_stage(calls)), calls), exact)
    teacher_error = distance(draw(digits_run, digits_run.guided_teacher(), calls // 2), exact)
    assert student_error * closer < teacher_error


@pytest.mark.slow
def test_the_digits_recipe_beats_the_guided_teacher_at_every_equal_number_of_steps(tmp_path: Path) -> None:
    recipe = Recipe.load(Path(str(files("training") / "recipes" / "digits.toml")))
    run = Run(recipe, tmp_path, Accelerator(cpu=True))
    distill.distill(run)
    teacher = run.guided_teacher()
    reference = draw(run, teacher, EXACT_STEPS)
    for steps in (4, 2, 1):
        student_error = distance(draw(run, run.denoiser(student_stage(steps)), steps), reference)
        assert student_error < distance(draw(run, teacher, steps), reference), f"{steps} steps"


def test_stage_one_matches_guidance_in_one_call(digits_run: Run, exact: Tensor) -> None:
    """One call of the stage-1 student is near two calls of the teacher, and knows w from no guidance."""
    unguided = draw(digits_run, digits_run.denoiser("teacher"), 32)
    student = draw(digits_run, digits_run.denoiser("stage1"), 32)
    assert distance(student, exact) < 0.5 * distance(unguided, exact)


def test_an_untrained_student_is_the_conditional_teacher_at_every_w(digits_run: Run) -> None:
    teacher = digits_run.denoiser("teacher")
    student = student_from(teacher).eval()
    z = torch.randn(4, *digits_run.data.shape, generator=generator_at(0, 0))
    inputs = (z, torch.full((4,), 0.5), {"label": torch.arange(4)})
    with torch.no_grad():
        conditional = teacher(*inputs, torch.zeros(4))
        assert torch.equal(student(*inputs, torch.tensor([0.0, 1.0, 2.0, 4.0])), conditional)


SMALL = """
name = "small"
conditioning = "class"
data = { source = "digits", size = 8 }
network = { channels = [8], norm_groups = 4 }
teacher = { updates = 6, batch_size = 16, learning_rate = 1e-3 }
stage1 = { updates = 3, batch_size = 16, learning_rate = 1e-3 }
stage2 = { start = 2, rounds = [{ steps = 1, updates = 3, batch_size = 16, learning_rate = 1e-3 }] }
export = { licence = "CC-BY-4.0", steps = [1] }
"""


def test_a_ladder_reaches_one_from_a_start_that_is_no_power_of_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 21 to 7 to 1: a round asks its teacher for the steps that each of its own replaces."""
    halved = SMALL[SMALL.index("stage2") : SMALL.index("export")]
    short = "updates = 3, batch_size = 8, learning_rate = 1e-3"
    rounds = ", ".join(f"{{ steps = {steps}, {short} }}" for steps in (7, 1))
    (tmp_path / "small.toml").write_text(SMALL.replace(halved, f"stage2 = {{ start = 21, rounds = [{rounds}] }}\n"))
    run = Run(Recipe.load(tmp_path / "small.toml"), tmp_path / "run", Accelerator(cpu=True))
    batches_asked_of: list[int] = []

    def counted(_: Run, denoiser: Denoiser) -> Denoiser:
        number = len(batches_asked_of)
        batches_asked_of.append(0)

        def ask(z: Tensor, t: Tensor, condition: Condition, w: Tensor) -> Tensor:
            batches_asked_of[number] += len(z) == 8
            return denoiser(z, t, condition, w)

        return ask

    monkeypatch.setattr(Run, "compiled", counted)
    distill.distill(run)
    assert [count for count in batches_asked_of if count] == [3 * 3, 3 * 7]
    rows = json.loads((run.folder / "rounds.json").read_text())
    assert [(row["steps"], row["reference_steps"]) for row in rows] == [(21, 21), (7, 21), (1, 21)]
    assert rows[0]["to_its_teacher"] == rows[0]["to_guided_teacher"] > rows[0]["guided_ddim"] == 0


def student_weights(folder: Path, more: str = "") -> Tensor:
    """The weights of the student of one step of a small run, whose recipe says `more`."""
    folder.mkdir()
    (folder / "small.toml").write_text(SMALL + more)
    run = Run(Recipe.load(folder / "small.toml"), folder / "run", Accelerator(cpu=True))
    distill.distill(run)
    return torch.cat([value.flatten() for value in run.denoiser(student_stage(1)).network.state_dict().values()])


@pytest.mark.parametrize(
    "scale",
    [
        "micro_batch = 5",
        "gradient_checkpointing = true",
        "capture = true",
        pytest.param(
            "compile = true",
            marks=[
                pytest.mark.slow,
                pytest.mark.filterwarnings("ignore:.*is deprecated.*torch.compile:DeprecationWarning"),
            ],
        ),
    ],
)
def test_how_a_run_fits_its_machine_does_not_change_its_student(tmp_path: Path, scale: str) -> None:
    plain = student_weights(tmp_path / "plain")
    scaled = student_weights(tmp_path / "scaled", f"[scale]\n{scale}\n")
    assert (scaled - plain).norm() < 1e-4 * plain.norm()


VALIDATED = """
name = "validated"
conditioning = "class"
data = { source = "digits", size = 8 }
export = { licence = "CC-BY-4.0", steps = [1] }
stage2 = { start = 2, rounds = [{ steps = 1, updates = 3, batch_size = 16, learning_rate = 1e-3 }] }
[network]
channels = [8]
norm_groups = 4
[autoencoder]
channels = [8, 8]
norm_groups = 4
"""


def test_every_stage_keeps_its_best_network_and_ends_when_none_is_better(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rates that are far too high: what the last updates make is worse than what was there before."""
    taken = dict[str, list[float]]()
    fixed = distill._fixed_loss

    def noted(run: Run, stage: str, *rest: Any) -> Callable[[nn.Module], float]:
        distance, values = fixed(run, stage, *rest), taken.setdefault(stage, [])

        def note(network: nn.Module) -> float:
            values.append(distance(network))
            assert distance(network) == values[-1], "always of the same data, times and noise"
            return values[-1]

        return note

    monkeypatch.setattr(distill, "_fixed_loss", noted)
    setting = "updates = 60\nbatch_size = 16\nvalidate_every = 2\npatience = 1\nspike = 1e30\nlearning_rate ="
    stages = ("autoencoder", "teacher", "stage1")
    settings = [f"{setting} 0.3\n" if stage == "autoencoder" else f"[{stage}]\n{setting} 0.3\n" for stage in stages]
    (tmp_path / "validated.toml").write_text(VALIDATED + "".join(settings))
    run = Run(Recipe.load(tmp_path / "validated.toml"), tmp_path / "run", Accelerator(cpu=True))
    distill.distill(run)
    for stage in stages:
        last = json.loads((run.folder / stage / "log.jsonl").read_text().splitlines()[-1])
        values = taken[stage]
        assert last["update"] == 2 * len(values) < 60, stage
        assert last["kept"] == 2 * (1 + values.index(min(values))) == last["update"] - 2, stage


def test_the_weighting_of_the_loss_changes_the_student(tmp_path: Path) -> None:
    plain = student_weights(tmp_path / "plain")
    uniform = SMALL.replace("stage1 = {", 'stage1 = { weighting = "uniform",')
    assert uniform != SMALL
    (tmp_path / "uniform.toml").write_text(uniform)
    run = Run(Recipe.load(tmp_path / "uniform.toml"), tmp_path / "run", Accelerator(cpu=True))
    distill.distill(run)
    weights = run.denoiser(student_stage(1)).network.state_dict().values()
    assert (torch.cat([value.flatten() for value in weights]) - plain).norm() > 1e-3 * plain.norm()


def test_networks_may_predict_x(tmp_path: Path) -> None:
    """All of a run's do; and a teacher's weighting changes it, as a student's does."""

    def opened(weighting: str) -> Run:
        text = SMALL.replace("channels = [8]", 'channels = [8], prediction = "x"')
        text = text.replace("updates = 6", "updates = 200")
        for stage in ("teacher", "stage1"):
            text = text.replace(f"{stage} = {{", f'{stage} = {{ weighting = "{weighting}",')
        (tmp_path / f"{weighting}.toml").write_text(text)
        return Run(Recipe.load(tmp_path / f"{weighting}.toml"), tmp_path / weighting, Accelerator(cpu=True))

    run, uniform = opened("clamped-snr"), opened("uniform")
    distill.distill(run)
    distill.train_teacher(uniform)
    teachers = [torch.cat([p.flatten() for p in r.denoiser("teacher").parameters()]) for r in (run, uniform)]
    assert not torch.allclose(*teachers, rtol=1e-3)
    stages = [run.denoiser(stage) for stage in ("teacher", "stage1", student_stage(1))]
    assert [denoiser.prediction for denoiser in stages] == ["x", "x", "x"]
    config = json.loads((run.folder / student_stage(1) / "scheduler" / "scheduler_config.json").read_text())
    assert config["prediction_type"] == "sample"

    x, labels = run.data.x[:64], run.data.condition[:64]  # type: ignore[union-attr, index]
    t = torch.full((64,), 0.3)
    alpha, sigma = run.schedule.at(t, x)
    z = diffuse(x, torch.randn(x.shape, generator=generator_at(0, 0)), alpha, sigma)
    for denoiser in stages[:2]:  # taken for x, a v would be far off
        with torch.no_grad():
            made = x_from_v(z, denoiser(z, t, {"label": labels}, torch.zeros(64)), alpha, sigma)
        assert distance(made, x) < 0.6 * distance(z / alpha, x)


@pytest.mark.parametrize("schedule", ["continuous-cosine", "scaled-linear", "rectified-flow"])
def test_a_teacher_is_trained_on_any_schedule(tmp_path: Path, schedule: str) -> None:
    text = SMALL.replace("teacher = {", f'teacher = {{ schedule = "{schedule}",')
    (tmp_path / "small.toml").write_text(text)
    run = Run(Recipe.load(tmp_path / "small.toml"), tmp_path / "run", Accelerator(cpu=True))
    distill.distill(run)
    assert run.schedule.continuous == (schedule != "scaled-linear")
    noise = torch.randn(4, *run.shape, generator=generator_at(0, 0))
    student = run.denoiser(student_stage(1))
    made = sample(student, run.schedule.grid(1), noise, {"label": torch.arange(4)}, torch.ones(4))
    assert made.isfinite().all()


def test_guidance_embedding_is_the_stock_pipelines() -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    from training.networks import guidance_embedding

    w = torch.tensor([0.0, 0.5, 3.0])
    stock = StableDiffusionPipeline.get_guidance_scale_embedding(None, w, embedding_dim=256)
    assert torch.allclose(guidance_embedding(w), stock, atol=1e-3)


def test_finished_stages_are_kept_and_a_missing_one_is_made_again(digits_run: Run) -> None:
    last, earlier = (digits_run.folder / student_stage(steps) / NETWORK for steps in (1, 2))
    made, kept_at = digits_run.weights(student_stage(1)), earlier.stat().st_mtime_ns
    shutil.rmtree(last)
    distill.distill(digits_run)
    assert digits_run.weights(student_stage(1)) == made, "the same seed makes the same student"
    assert earlier.stat().st_mtime_ns == kept_at


def test_every_stage_leaves_a_log_and_a_picture(digits_run: Run) -> None:
    for stage in ("teacher", "stage1", "student-4", "student-2", "student-1"):
        assert (digits_run.folder / stage / "log.jsonl").stat().st_size > 0
        assert (digits_run.folder / stage / "samples.png").stat().st_size > 0
        assert not (digits_run.folder / stage / "checkpoint.pt").exists()


def test_weights_may_be_read_by_whoever_may_read_their_config(digits_run: Run) -> None:
    for weights in digits_run.folder.rglob("*.safetensors"):
        assert weights.stat().st_mode == (weights.parent / "config.json").stat().st_mode


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()], ids=["full", "killed"])
def test_a_stage_is_done_once_its_last_picture_is_drawn_or_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fails(*_: Any) -> None:
        raise error

    (tmp_path / "small.toml").write_text(SMALL)
    run = Run(Recipe.load(tmp_path / "small.toml"), tmp_path / "run", Accelerator(cpu=True))
    is_killed = isinstance(error, KeyboardInterrupt)
    monkeypatch.setattr(distill, "TEACHER_SAMPLE_STEPS", 2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) if is_killed else nullcontext():
        patch.setattr(distill, "save_grid", fails)
        distill.train_teacher(run)
    assert run.is_done("teacher") != is_killed
    distill.train_teacher(run)
    assert (run.folder / "teacher" / "samples.png").exists() == is_killed


def test_a_folder_is_not_shared_by_two_recipes(digits_run: Run) -> None:
    other = digits_run.recipe.model_copy(update={"seed": 1})
    with pytest.raises(
        TrainingError, match=r"seed\).* remove the folders of those that are to be trained anew, and of"
    ):
        Run(other, digits_run.folder, Accelerator(cpu=True))


def test_a_stage_that_is_not_done_is_named(digits_run: Run, tmp_path: Path) -> None:
    run = Run(digits_run.recipe, tmp_path / "empty", Accelerator(cpu=True))
    with pytest.raises(TrainingError, match="student-4 holds no trained network"):
        run.denoiser(student_stage(4))


def test_a_run_notices_that_its_data_changed(digits_run: Run, tmp_path: Path) -> None:
    run = Run(digits_run.recipe, tmp_path, Accelerator(cpu=True))
    assert len(run.data) == len(digits_run.data)
    (tmp_path / "data-denoiser.json").write_text('{"sha256": "of other images"}')
    with pytest.raises(TrainingError, match="other images, captions or classes"):
        _ = Run(digits_run.recipe, tmp_path, Accelerator(cpu=True)).data


def test_a_batch_of_any_stage_that_the_processes_cannot_share_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Accelerator, "num_processes", 16)
    (tmp_path / "small.toml").write_text(SMALL)
    Run(Recipe.load(tmp_path / "small.toml"), tmp_path / "shared", Accelerator(cpu=True))
    last = "{ steps = 1, updates = 3, batch_size = "
    (tmp_path / "small.toml").write_text(SMALL.replace(f"{last}16", f"{last}24"))
    with pytest.raises(TrainingError, match="16 processes cannot share batches of 24 rows"):
        Run(Recipe.load(tmp_path / "small.toml"), tmp_path / "refused", Accelerator(cpu=True))
    assert not (tmp_path / "refused").exists()
    (tmp_path / "small.toml").write_text(SMALL + "[scale]\ncapture = true\n")
    with pytest.raises(TrainingError, match="capture is for one process"):
        Run(Recipe.load(tmp_path / "small.toml"), tmp_path / "refused", Accelerator(cpu=True))


def test_a_stochastic_student_is_compared_at_the_places_of_its_own_sampler() -> None:
    """One that is right at those of the deterministic sampler alone is not near its teacher."""
    mixture, schedule, steps = GaussianMixture.on_a_circle(4), Schedule.cosine(64), 2
    teacher, draws = ExactDenoiser(mixture, schedule), Draws(0, 0, range(TRIAL_ROWS))
    run: Any = SimpleNamespace(schedule=schedule, recipe=SimpleNamespace(seed=0), accelerator=Accelerator(cpu=True))
    noise, label = draws.normal(torch.empty(TRIAL_ROWS, 4)), {"label": draws.integers(mixture.classes)}
    trial = Trial(run, False, noise, Batch(noise, label), torch.zeros(TRIAL_ROWS))

    def student(z: Tensor, t: Tensor, condition: Condition, w: Tensor, at_odd_places: float) -> Tensor:
        v = target_along(teacher, schedule, z, stochastic_step(t, steps), condition, w)
        return v * (at_odd_places if (t[0] * 2 * steps) % 2 == 1 else 1.0)

    good, bad = (partial(student, at_odd_places=factor) for factor in (1.0, 0.0))
    deterministic, stochastic = (trial.from_teacher(teacher, 2 * steps, steps, noisy) for noisy in (False, True))
    assert max(deterministic(good), deterministic(bad), stochastic(good)) < 1e-5
    assert stochastic(bad) > 0.1


def test_what_killed_writers_left_is_swept_by_the_next_run_in_the_folder_a_day_later(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(SMALL)
    recipe, folder = Recipe.load(tmp_path / "small.toml"), tmp_path / "run"
    (folder / "teacher").mkdir(parents=True)
    old, new = folder / "teacher" / ".log.jsonl.0123abcd.partial", folder / ".rounds.md.4567cdef.partial"
    of_stage = folder / "teacher" / "unet.partial"
    for path in (old, new, of_stage):
        path.touch()
        if path != new:
            os.utime(path, (0, 0))
    captions, written = (folder / "cache" / f".captions.{k}123abcd.partial" for k in (0, 1))
    for path in (captions, written):
        path.mkdir(parents=True)
        (path / "context.npy").touch()
        if path == captions:
            os.utime(path / "context.npy", (0, 0))
        os.utime(path, (0, 0))
    Run(recipe, folder, Accelerator(cpu=True))
    assert sorted(folder.rglob("*.partial")) == sorted((new, of_stage, written))


def test_a_broken_record_is_named(digits_run: Run, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(TrainingError, match=r"recipe\.json is not JSON"):
        Run(digits_run.recipe, tmp_path, Accelerator(cpu=True))


def test_a_row_that_a_kill_left_out_of_the_table_is_made(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(SMALL)
    run = Run(Recipe.load(tmp_path / "small.toml"), tmp_path / "run", Accelerator(cpu=True))
    distill.distill(run)
    table, weights = (run.folder / "rounds.json").read_text(), run.weights(student_stage(1))
    assert [row["stage"] for row in json.loads(table)] == ["stage1", "student-1"]
    (run.folder / "rounds.json").unlink()
    (run.folder / student_stage(1) / "checkpoint.pt").write_bytes(b"left behind")
    distill.distill(run)
    assert (run.folder / "rounds.json").read_text() == table
    assert run.weights(student_stage(1)) == weights
    assert not (run.folder / student_stage(1) / "checkpoint.pt").exists()
    (run.folder / "rounds.json").write_text("")
    with pytest.raises(TrainingError, match=r"rounds\.json is damaged"):
        distill.distill(run)
    (run.folder / "rounds.json").unlink()
    with (run.folder / student_stage(1) / "log.jsonl").open("ab") as log:
        log.write(b'{"update": 9, \xff')
    distill.distill(run)
    assert [row["updates"] for row in json.loads((run.folder / "rounds.json").read_text())][-1] is None
