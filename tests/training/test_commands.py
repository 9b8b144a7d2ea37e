"""The subcommands as a user meets them: a run killed for real resumes, and errors are one line."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file

import fewstep
from training.lock import training_alone
from training.run import NETWORK

RECIPE = """
name = "killed"
conditioning = "class"
data = { source = "digits", size = 8 }
network = { channels = [8], norm_groups = 4 }
teacher = { updates = 60, batch_size = 16, learning_rate = 1e-3, ema = 0.9 }
stage1 = { updates = 5, batch_size = 16, learning_rate = 1e-3 }
stage2 = { start = 2, rounds = [{ steps = 1, updates = 5, batch_size = 16, learning_rate = 1e-3 }] }
export = { licence = "CC-BY-4.0", steps = [1] }
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "killed.toml"
    path.write_text(RECIPE)
    return path


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(fewstep.main, [str(argument) for argument in arguments])


@pytest.mark.slow
def test_a_run_that_is_killed_in_mid_update_ends_with_the_same_weights(recipe: Path, tmp_path: Path) -> None:
    """In bf16, which takes processes of its own: accelerate allows one precision in each."""
    recipe.write_text('precision = "bf16"' + RECIPE)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, "-m", "fewstep", "distill", str(recipe), "--checkpoint-every", "0", "--out"]
    process = subprocess.Popen([*command, str(killed)])
    log, deadline = killed / "teacher" / "log.jsonl", time.monotonic() + 120
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "student-1").exists()

    for folder in (killed, whole):
        subprocess.run([*command, str(folder)], check=True)
    for stage in ("teacher", "stage1", "student-1"):
        weights = [load_file(next((folder / stage / NETWORK).glob("*.safetensors"))) for folder in (killed, whole)]
        assert weights[0].keys() == weights[1].keys()
        assert all(bool((weights[0][name] == weights[1][name]).all()) for name in weights[0])


@pytest.mark.parametrize("command", ["train", "distill"])
def test_a_folder_in_which_another_process_trains_is_refused_and_may_be_read(
    recipe: Path, tmp_path: Path, command: str
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with training_alone(folder):
        refused = invoke(command, recipe, "--out", folder)
        assert refused.exit_code == 1
        assert refused.output.splitlines()[-1].startswith(f"Error: another process is training in {folder}: wait")
        assert not (folder / "teacher").exists()
        for reads in (["export", recipe, tmp_path / "bundle", "--run", folder], ["evaluate", recipe, "--run", folder]):
            assert "no trained" in invoke(*reads).output.splitlines()[-1], "what it would read"


def test_what_is_damaged_of_a_stage_that_is_done_is_named(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert invoke("distill", recipe, "--out", folder).exit_code == 0
    network = folder / "student-1" / NETWORK
    (network / "config.json").write_text("{")
    said = invoke("export", recipe, tmp_path / "bundle", "--run", folder)
    assert said.exit_code == 1
    assert f"Error: {network}: the network of a stage that is done cannot be read" in said.output
    for weights in network.glob("*.safetensors"):
        weights.unlink()
    said = invoke("evaluate", recipe, "--run", folder, "--samples", "8", "--frechet-dims", "4")
    assert f"Error: {network}: the weights of a stage that is done are gone" in said.output


def test_a_run_that_has_nothing_left_to_do_says_so(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for command in ("train", "distill"):
        assert "nothing is left" not in invoke(command, recipe, "--out", folder).output
        again = invoke(command, recipe, "--out", folder)
        assert again.exit_code == 0
        told = f"{folder}: nothing is left to do, every stage of `{command}` is done"
        assert again.output.splitlines()[-1] == told


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "set scale.compile in the recipe"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "8"}, "set scale.micro_batch in the recipe"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "set precision in the recipe"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "launch with --fsdp_version 2"),
    ],
)
def test_what_a_launcher_asks_for_and_is_not_done_is_refused(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], says: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = invoke("distill", recipe, "--out", tmp_path / "run")
    assert result.exit_code == 1
    assert says in result.output.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "{recipe}", "--data", "."], "they lie in no folder"),
        (["distill", "{recipe}", "--sample-every", "0"], "not in the range"),
        (["distill", "{recipe}", "--checkpoint-every", "nan"], "nan is not a finite number"),
        (["distill", "absent.toml"], "does not exist"),
        (["export", "{recipe}", "bundle", "--run", "."], "there is no run in ."),
        (["export", "{recipe}", "bundle"], "there is no run in runs/killed"),
        (["distill", "{recipe}", "--out", "{recipe}"], "File exists"),
    ],
)
def test_errors_are_one_line(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(*(argument.format(recipe=recipe) for argument in arguments))
    assert result.exit_code in (1, 2)
    assert isinstance(result.exception, SystemExit)
    assert says in result.output.splitlines()[-1]
