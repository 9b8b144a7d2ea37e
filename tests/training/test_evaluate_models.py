"""`fewstep evaluate` with FID's Inception and a CLIP model of random weights: asked for, measured, kept, printed."""

from __future__ import annotations

import csv
from pathlib import Path
from types import ModuleType

import pytest

from engines.hashes import sha256_of
from tests.training.evaluations import invoke, make_captioned_run
from tests.training.small_models import write_clip, write_inception
from training.evaluation import inception
from training.evaluation.clip_score import ClipScorer
from training.evaluation.inception import Inception

QUICK = [
    *("--features", "pixels", "--frechet-dims", "4", "--samples", "10", "--guidance", "1", "--teacher-steps", "1"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of a teacher alone, on 20 images: 10 give captions, 10 are the reference."""
    return make_captioned_run(tmp_path, monkeypatch, images=20, students=())


def figures(folder: Path, name: str) -> list[float]:
    with (folder / "run" / "evaluation" / "table.csv").open() as file:
        return [float(line[name]) for line in csv.DictReader(file)]


def refuse(*_: object) -> None:
    raise AssertionError("measured again")


def test_the_clip_score_is_printed_and_measured_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = write_clip(folder / "tiny-clip", seed=3)
    result = invoke(folder, *QUICK, "--clip", str(clip))
    assert result.exit_code == 0, result.output
    assert "**CLIP score**" in result.stdout
    assert "CLIP of tiny-clip" in result.stdout
    assert "--clip tiny-clip" in result.stdout
    assert "**FID**" not in result.stdout
    scores = figures(folder, "clip_score")
    teacher, floor = scores
    assert teacher != floor
    assert 0 <= min(scores) <= max(scores) <= 100
    with monkeypatch.context() as patch:
        patch.setattr(ClipScorer, "__call__", refuse)
        assert invoke(folder, *QUICK, "--clip", str(clip)).stdout == result.stdout
    write_clip(clip, seed=1)
    assert invoke(folder, *QUICK, "--clip", str(clip)).exit_code == 0
    assert figures(folder, "clip_score") != scores


def test_fid_and_inception_score_are_printed_and_measured_once(
    folder: Path, torch_fidelity: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = write_inception(folder / "random.pth", monkeypatch)
    monkeypatch.setattr(inception, "WEIGHTS_SHA256", sha256_of(weights)[:8])
    result = invoke(folder, *QUICK, "--inception", str(weights))
    assert result.exit_code == 0, result.output
    for title in ("**FID**", "**Inception Score**", sha256_of(weights)[:12], "--inception random.pth"):
        assert title in result.stdout
    assert "**CLIP score**" not in result.stdout
    teacher, floor = figures(folder, "fid")
    assert teacher > floor > 0
    assert all(score >= 1 for score in figures(folder, "inception_score"))
    monkeypatch.setattr(Inception, "__call__", refuse)
    monkeypatch.setattr("training.evaluation.judge.inception_score", refuse)
    assert invoke(folder, *QUICK, "--inception", str(weights)).stdout == result.stdout


def test_a_folder_without_a_clip_model_is_refused(folder: Path) -> None:
    result = invoke(folder, *QUICK, "--clip", str(folder / "set"))
    assert result.exit_code == 1
    assert "holds no CLIP model and processor" in result.output
