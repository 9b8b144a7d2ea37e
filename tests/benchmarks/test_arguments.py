"""What the benchmarks are given and cannot be is told in a line, before anything is begun."""

from __future__ import annotations

from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks import against_eager

DIGITS = str(files("training") / "recipes" / "digits.toml")


@pytest.mark.parametrize("module", ["cpu_engines", "precisions", "programs"])
def test_a_bundle_that_is_nowhere_is_told_in_a_line(module: str) -> None:
    assert_told(import_module(f"benchmarks.{module}").main, "nowhere")


@pytest.mark.parametrize("module", ["faults.__main__", "service_load", "service_overload", "two_hosts"])
def test_so_is_one_that_is_an_option(module: str) -> None:
    assert_told(import_module(f"benchmarks.{module}").main, "--bundle", "nowhere")


def assert_told(main: Any, *arguments: str) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "no bundle 'nowhere'" in result.output.splitlines()[-1]


def test_a_run_that_was_not_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(against_eager.main, [DIGITS, str(tmp_path)])
    assert result.exit_code == 1
    assert "there is no run in runs/digits" in result.output
    assert not (tmp_path / "runs").exists()
