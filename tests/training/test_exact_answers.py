"""Both stages against exact answers: a Gaussian mixture's guided denoiser is the teacher, in closed form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.exact_answers import LAST_ENCODER, LONG, SHORT, Effort, Problem

# How many times nearer to the exact ODE map than guided DDIM at the same number of steps.
NEARER = {8: 2.5, 4: 5.0, 2: 10.0, 1: 10.0}

# In two dimensions this is enough.
QUICK = Effort(stage1=2000, halving=300, last=800, to_one=200, batch_size=256)

# How many times nearer to the exact noise encoders are than guided DDIM in reverse.
ENCODED_NEARER = {8: 3.0, 4: 4.0}


def check(dimensions: int, folder: Path, effort: Effort, stage1_error: float, encoders: bool = True) -> None:
    problem = Problem(dimensions, folder)
    stage1 = problem.match_outputs(effort)
    error = problem.output_error(stage1)
    print(f"{dimensions} dimensions, stage 1: {error:.4f}")
    assert error < stage1_error
    for steps, (ours, theirs) in problem.map_errors(problem.halvings(stage1, effort)).items():
        print(f"{steps} steps: student {ours:.4f}, guided DDIM {theirs:.4f}")
        assert ours * NEARER.get(steps, 0.0) < theirs, f"{steps} steps"
    if not encoders:
        return
    made = problem.halvings(stage1, effort, LAST_ENCODER, "encoding")
    for steps, (ours, theirs) in problem.encoding_errors(made).items():
        print(f"{steps} steps: encoder {ours:.4f}, guided DDIM in reverse {theirs:.4f}")
        assert ours * ENCODED_NEARER.get(steps, 0.0) < theirs, f"{steps} steps"


@pytest.mark.parametrize(
    ("dimensions", "effort"), [(2, QUICK), pytest.param(16, SHORT, marks=pytest.mark.slow)], ids=["2", "16"]
)
def test_a_short_run_comes_near_the_exact_answers(dimensions: int, effort: Effort, tmp_path: Path) -> None:
    check(dimensions, tmp_path, effort, 0.02, encoders=False)


@pytest.mark.slow
def test_a_ladder_need_not_halve(tmp_path: Path) -> None:
    """From 75 steps to 15, to 3 and to 1: the students come as near as those of halvings."""
    problem, longer = Problem(2, tmp_path), replace(QUICK, halving=1200)
    stage1 = problem.match_outputs(QUICK)
    fifteen = problem.halve(stage1, 15, longer, replaced=5)
    three = problem.halve(fifteen, 3, longer, replaced=5)
    one = problem.halve(three, 1, longer, replaced=3)
    for steps, (ours, theirs) in problem.map_errors({3: three, 1: one}).items():
        print(f"{steps} steps: student {ours:.4f}, guided DDIM {theirs:.4f}")
        assert ours * {3: 5.0, 1: 10.0}[steps] < theirs, f"{steps} steps"


@pytest.mark.slow
@pytest.mark.parametrize("dimensions", [2, 16])
def test_a_long_run_comes_nearer(dimensions: int, tmp_path: Path) -> None:
    check(dimensions, tmp_path, LONG, 0.01)
