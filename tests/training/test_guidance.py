"""Guidance: w = 0 is off, the result is affine in w, and it commutes with the conversions."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from training.diffusion import x_from_v
from training.guidance import Condition, GuidedTeacher, guided

W = st.floats(0, 10)


def draw(seed: int) -> Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_w_zero_is_the_conditional_prediction() -> None:
    assert torch.equal(guided(draw(0), draw(1), torch.zeros(2, dtype=torch.float64)), draw(0))


@given(W, W)
def test_affine_in_w(w: float, other: float) -> None:
    def at(value: float) -> Tensor:
        return guided(draw(0), draw(1), torch.full((2,), value, dtype=torch.float64))

    assert torch.allclose(at((w + other) / 2), (at(w) + at(other)) / 2, rtol=0, atol=1e-9)


@given(W)
def test_equal_predictions_leave_nothing_to_guide(w: float) -> None:
    assert torch.allclose(guided(draw(0), draw(0), torch.full((2,), w, dtype=torch.float64)), draw(0))


@given(W)
def test_guiding_v_is_guiding_x(w: float) -> None:
    z, alpha, sigma = draw(2), torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)
    weight = torch.full((2,), w, dtype=torch.float64)
    through_v = x_from_v(z, guided(draw(0), draw(1), weight), alpha, sigma)
    through_x = guided(x_from_v(z, draw(0), alpha, sigma), x_from_v(z, draw(1), alpha, sigma), weight)
    assert torch.allclose(through_v, through_x)


def test_teacher_gives_each_row_its_own_w_and_the_null_condition() -> None:
    seen: list[Condition] = []

    def network(z: Tensor, t: Tensor, condition: Condition, w: Tensor) -> Tensor:
        seen.append(condition)
        return z * condition["scale"][:, None]

    teacher = GuidedTeacher(network, network, {"scale": torch.tensor(1.0)})
    z = torch.ones(3, 2)
    out = teacher(z, torch.ones(3), {"scale": torch.tensor([2.0, 3.0, 4.0])}, torch.tensor([0.0, 1.0, 2.0]))
    assert out[:, 0].tolist() == [2.0, 5.0, 10.0]
    assert seen[1]["scale"].tolist() == [1.0, 1.0, 1.0]
