"""The command line: every entry of the table exists, and a missing package is named with its extra."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import fewstep


@pytest.mark.parametrize("name", list(fewstep.COMMANDS))
def test_every_subcommand_has_help(name: str) -> None:
    result = CliRunner().invoke(fewstep.main, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert "Usage:" in result.output


def test_help_lists_the_table() -> None:
    output = CliRunner().invoke(fewstep.main, ["--help"]).output
    assert all(name in output for name in fewstep.COMMANDS)


def test_an_unknown_subcommand_is_a_usage_error() -> None:
    result = CliRunner().invoke(fewstep.main, ["paint"])
    assert result.exit_code == 2
    assert "No such command 'paint'" in result.output


def missing(name: str) -> object:
    def import_module(_: str) -> object:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    return import_module


def test_a_missing_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.import_module", missing("torch"))
    result = CliRunner().invoke(fewstep.main, ["distill", "recipe.toml"])
    assert result.exit_code == 1
    assert "needs the training extra (torch is missing): pip install 'fewstep[training]'" in result.output


def test_an_extra_that_is_missed_at_work_is_named_too(tmp_path: Path) -> None:
    code = "import sys; sys.modules['sklearn'] = None; import fewstep; fewstep.main(['data', 'digits', sys.argv[1]])"
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "needs the training extra (sklearn is missing)" in result.stderr
    assert "Traceback" not in result.stderr


def test_output_that_cannot_be_written_is_told_in_a_line() -> None:
    command = [sys.executable, "-m", "fewstep", "keys", "new", "ann"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "Error: the output: No space left on device\n")


SIGNALLED = """
import os, signal, sys, tempfile, time, types, click, fewstep

@click.command()
def work():
    with tempfile.TemporaryDirectory(dir=sys.argv[1]):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # a launcher passes on what all were sent

sys.modules["work"] = types.SimpleNamespace(work=work)
fewstep.COMMANDS["work"] = fewstep.Entry("work:work", "", sys.argv[2])
if len(sys.argv) > 3:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
fewstep.main(["work"])
"""


@pytest.mark.parametrize(
    ("extra", "own", "code", "left"),
    [("training", [], 143, 0), ("", [], -signal.SIGTERM, 1), ("training", ["own"], 3, 0)],
)
def test_sigterm_lets_training_tidy_up_and_is_left_to_others_and_to_their_handlers(
    tmp_path: Path, extra: str, own: list[str], code: int, left: int
) -> None:
    done = subprocess.run([sys.executable, "-c", SIGNALLED, str(tmp_path), extra, *own], check=False)
    assert (done.returncode, len(list(tmp_path.iterdir()))) == (code, left)


def test_a_command_that_is_done_leaves_sigterm_as_it_was() -> None:
    assert CliRunner().invoke(fewstep.main, ["data", "digits", "--help"]).exit_code == 0
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(("command", "package"), [("serve", "fastapi"), ("train", "training.distill")])
def test_what_no_extra_installs_is_not_blamed_on_one(
    monkeypatch: pytest.MonkeyPatch, command: str, package: str
) -> None:
    monkeypatch.setattr("importlib.import_module", missing(package))
    with pytest.raises(ModuleNotFoundError):
        fewstep.main.get_command(click.Context(fewstep.main), command)


def test_serving_and_the_command_line_import_no_torch() -> None:
    code = (
        "import sys, fewstep, service.app, engines.pipeline, engines.commands, service.commands;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'diffusers', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("module", ["engines.backends.ort", "engines.compile", "training.exporting.graphs"])
def test_onnx_runtime_reports_nothing_to_its_maker(module: str) -> None:
    code = (
        f"import os, sys, {module}; print(os.environ['ORT_DISABLE_TELEMETRY']);"
        "names = list(sys.modules); print(names.index('engines') < names.index('onnxruntime'))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    printed = subprocess.check_output([sys.executable, "-W", "ignore", "-c", code], env=environment, text=True)
    assert printed.split() == ["1", "True"]
