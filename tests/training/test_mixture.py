"""The mixture's closed forms against their definitions: what everything else is measured with must be right."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from training.diffusion import Schedule, diffuse, eps_from_v, x_from_v
from training.draws import generator_at
from training.guidance import GuidedTeacher
from training.mixture import ExactDenoiser, GaussianMixture, solve_guided_ode
from training.sampler import sample

SCHEDULE = Schedule.cosine()
START = (float(SCHEDULE.alphas[-1]), float(SCHEDULE.sigmas[-1]))


def at(phi: float, rows: int) -> tuple[Tensor, Tensor]:
    return tuple(torch.full((rows, 1), f(phi), dtype=torch.float64) for f in (math.cos, math.sin))  # type: ignore[return-value]


def log_density(mixture: GaussianMixture, z: Tensor, label: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """log p_t(z | class), up to a constant, written down from the definition of a mixture."""
    variance = (alpha * mixture.deviations).square() + sigma.square()
    offset = z[:, None] - alpha[..., None] * mixture.means
    terms = -0.5 * (offset.square().sum(-1) / variance + z.shape[1] * variance.log())
    member = (mixture.labels == label[:, None]) | (label[:, None] == mixture.classes)
    return torch.where(member, terms, -torch.inf).logsumexp(1)


@pytest.mark.parametrize("dimensions", [2, 16])
@pytest.mark.parametrize("phi", [0.02, 0.5, 1.2, math.pi / 2])
def test_eps_is_the_scaled_score_and_x_is_tweedies(dimensions: int, phi: float) -> None:
    """eps = -sigma grad log p_t(z) and x = (z - sigma eps) / alpha, for each class and for all of them."""
    mixture = GaussianMixture.on_a_circle(dimensions)
    z = torch.randn(20, dimensions, generator=generator_at(0, 0), dtype=torch.float64, requires_grad=True)
    label = torch.arange(20) % (mixture.classes + 1)
    alpha, sigma = at(phi, 20)
    (score,) = torch.autograd.grad(log_density(mixture, z, label, alpha, sigma).sum(), z)
    v = mixture.v(z.detach(), alpha, sigma, label)
    assert torch.allclose(eps_from_v(z, v, alpha, sigma), -sigma * score, atol=1e-8)
    assert torch.allclose(alpha * x_from_v(z, v, alpha, sigma), z + sigma.square() * score, atol=1e-8)


def test_data_has_the_mixtures_moments() -> None:
    mixture = GaussianMixture.on_a_circle(3)
    x, label = mixture.draw(200_000, generator_at(0, 0))
    for c in range(mixture.classes):
        mine = mixture.labels == c
        assert torch.allclose(x[label == c].mean(0), mixture.means[mine].mean(0), atol=0.02)
        variance = (mixture.means[mine].square() + mixture.deviations[mine, None].square()).mean(0)
        assert torch.allclose(x[label == c].square().mean(0), variance, atol=0.02)


def test_the_exact_denoiser_has_the_least_error() -> None:
    mixture = GaussianMixture.on_a_circle(2)
    generator = generator_at(0, 0)
    x, label = mixture.draw(100_000, generator)
    eps = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    alpha, sigma = at(0.9, len(x))
    z = diffuse(x, eps, alpha, sigma)
    exact = x_from_v(z, mixture.v(z, alpha, sigma, label), alpha, sigma)
    errors = [float((exact + shift - x).square().mean()) for shift in (-0.02, 0.0, 0.02)]
    assert errors[1] < min(errors[0], errors[2])
    unconditional = mixture.v(z, alpha, sigma, torch.full_like(label, mixture.classes))
    assert errors[1] < float((x_from_v(z, unconditional, alpha, sigma) - x).square().mean())


def test_the_ode_without_guidance_makes_the_data() -> None:
    mixture = GaussianMixture.on_a_circle(2)
    noise = torch.randn(4000, 2, generator=generator_at(0, 0))
    label = torch.ones(4000, dtype=torch.long)
    x = solve_guided_ode(mixture, noise, label, torch.zeros(4000), START, rtol=1e-6)
    mine = mixture.labels == 1
    assert torch.allclose(x.mean(0), mixture.means[mine].mean(0), atol=0.03)
    variance = (mixture.means[mine].square() + mixture.deviations[mine, None].square()).mean(0)
    assert torch.allclose(x.square().mean(0), variance, atol=0.05)


@pytest.mark.parametrize("dimensions", [2, 16])
def test_the_ode_is_solved_and_guided_ddim_converges_to_it(dimensions: int) -> None:
    mixture = GaussianMixture.on_a_circle(dimensions)
    exact = ExactDenoiser(mixture, SCHEDULE)
    teacher = GuidedTeacher(exact, exact, {"label": torch.tensor(mixture.classes)})
    noise = torch.randn(200, dimensions, generator=generator_at(1, 0), dtype=torch.float64)
    label, w = torch.arange(200) % mixture.classes, torch.linspace(0, 4, 200)
    solved = solve_guided_ode(mixture, noise, label, w, START)
    finer = solve_guided_ode(mixture, noise, label, w, START, rtol=1e-11)
    assert float((solved - finer).norm() / finer.norm()) < 1e-6
    errors = [
        float((sample(teacher, SCHEDULE.grid(steps), noise, {"label": label}, w) - finer).norm() / finer.norm())
        for steps in (64, 256, 1024)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.01


@pytest.mark.parametrize("given", [(1, 8, 4), (2, 4, 8), (2, 4, 0)])
def test_what_does_not_lie_on_a_circle_is_refused(given: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="on a circle"):
        GaussianMixture.on_a_circle(*given)
