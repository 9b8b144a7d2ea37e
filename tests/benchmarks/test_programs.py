"""The programs of a bundle run one by one: on a CPU here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import programs
from engines.backends.base import EngineError, EngineOptions, GraphSpec
from tests.bundles import make_tiny_bundle
from tests.programs import with_programs


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    return with_programs(make_tiny_bundle(folder, "class", "latent"), folder).path


def table(*arguments: str) -> list[list[str]]:
    result = CliRunner().invoke(programs.main, [*arguments, "--batch-sizes", "1,3", "--rounds", "1"])
    assert result.exit_code == 0, result.output
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in result.output.splitlines()[4:]]


def test_every_program_is_compared_in_every_precision(bundle: Path) -> None:
    lines = table(str(bundle))
    names = {line[0] for line in lines}
    assert {"encode, fp32, as it comes", "decode, fp16, as it comes", "step-1, bf16, as it comes"} <= names
    assert [line[1] for line in lines[:2]] == ["1", "3"]
    for name, _, first, later, milliseconds in lines:
        bound = 1e-5 if "fp32" in name else 0.1
        assert 0 <= max(float(first), float(later)) < bound, name
        assert float(milliseconds) > 0, name


def test_a_way_that_fails_has_its_reason_in_the_table(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ruined(graph: GraphSpec, options: EngineOptions, backend: str) -> None:
        raise EngineError(f"{graph.path.name}: {backend} is at 10 dB")

    monkeypatch.setattr(programs, "_built", ruined)
    lines = table(str(bundle), "--precision", "fp32", "--compile")
    assert ["decode, fp32, compiled", "decode.onnx: pytorch-aot is at 10 dB", "", "", ""] in lines
    assert sum("as it comes" in line[0] for line in lines) == len(lines) * 2 // 3


def test_what_cannot_be_run_is_said(tmp_path: Path, bundle: Path) -> None:
    plain = make_tiny_bundle(tmp_path, "class", "pixel")
    result = CliRunner().invoke(programs.main, [str(plain.path)])
    assert result.exit_code == 1
    assert "the bundle has no programs" in result.output
    if not torch.cuda.is_available():
        result = CliRunner().invoke(programs.main, [str(bundle), "--device", "cuda"])
        assert result.exit_code == 1
        assert "finds no CUDA device" in result.output
