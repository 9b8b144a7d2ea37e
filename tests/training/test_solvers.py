"""The baselines from diffusers on our schedule, with an exact denoiser: right, finite, and of second order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from training.diffusion import Schedule, stock_scheduler
from training.draws import generator_at
from training.guidance import Condition, GuidedTeacher
from training.mixture import ExactDenoiser, GaussianMixture, solve_guided_ode
from training.solvers import SOLVERS, Solver, sample_with, scheduler_for

COSINE = Schedule.cosine()
# The last alpha is exactly zero.
ZERO = Schedule.from_alphas_cumprod(torch.cat([COSINE.alphas[1:-1].double().square(), torch.zeros(1)]))
LINEAR = Schedule.from_alphas_cumprod((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0))
MIXTURE = GaussianMixture.on_a_circle(2)
LABEL, W = torch.arange(60) % MIXTURE.classes, torch.linspace(0, 4, 60)
NOISE = torch.randn(60, 2, generator=generator_at(1, 0), dtype=torch.float64)
BASELINES: tuple[Solver, ...] = SOLVERS[1:]


def samples(sampler: Solver, steps: int, schedule: Schedule = COSINE) -> Tensor:
    exact = ExactDenoiser(MIXTURE, schedule)
    teacher = GuidedTeacher(exact, exact, {"label": torch.tensor(MIXTURE.classes)})
    return sample_with(sampler, teacher, schedule, steps, NOISE, {"label": LABEL}, W)


def apart(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm() / y.norm())


@pytest.mark.parametrize("schedule", [COSINE, ZERO, LINEAR], ids=["cosine", "zero", "linear"])
@pytest.mark.parametrize("sampler", BASELINES)
def test_with_many_steps_a_solver_ends_where_ddim_does(sampler: Solver, schedule: Schedule) -> None:
    many = samples("ddim", schedule.timesteps, schedule)
    errors = [apart(samples(sampler, steps, schedule), many) for steps in (8, 200)]
    assert errors[1] < 0.003
    assert errors[1] < errors[0] / 10


@pytest.mark.parametrize("sampler", BASELINES)
def test_a_solvers_error_falls_faster_than_that_of_ddim(sampler: Solver) -> None:
    start = (float(COSINE.alphas[-1]), float(COSINE.sigmas[-1]))
    solved = solve_guided_ode(MIXTURE, NOISE, LABEL, W, start)
    errors = [apart(samples(sampler, steps), solved) for steps in (16, 32, 64)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < apart(samples("ddim", 64), solved) / 4


@pytest.mark.parametrize("schedule", [COSINE, ZERO], ids=["cosine", "zero"])
@pytest.mark.parametrize("sampler", BASELINES)
def test_few_steps_are_finite_and_one_step_is_ddims(sampler: Solver, schedule: Schedule) -> None:
    for steps in (1, 2, 3, 4, 5):
        assert samples(sampler, steps, schedule).isfinite().all()
    assert apart(samples(sampler, 1, schedule), samples("ddim", 1, schedule)) < 1e-5


# With 49 and 98 diffusers' own spacing has one timestep too many.
@pytest.mark.parametrize("steps", [1, 4, 7, 49, 50, 98, 1024])
@pytest.mark.parametrize("sampler", SOLVERS)
def test_every_sampler_calls_the_denoiser_once_a_step_at_the_times_of_the_grid(sampler: Solver, steps: int) -> None:
    times = []

    def denoiser(z: Tensor, t: Tensor, condition: Condition, w: Tensor) -> Tensor:
        assert t.shape == (len(z),)
        times.append(float(t[0]))
        return torch.zeros_like(z)

    sample_with(sampler, denoiser, COSINE, steps, torch.randn(2, 3), {}, torch.zeros(2))
    rounding = 0.0 if sampler == "ddim" else 0.5 / COSINE.timesteps
    assert times == pytest.approx(COSINE.grid(steps).times[:-1].tolist(), abs=rounding + 1e-6)


@pytest.mark.parametrize("steps", [50, 8, 1])
def test_our_ddim_is_that_of_diffusers_where_timesteps_are_whole(steps: int) -> None:
    exact = ExactDenoiser(MIXTURE, LINEAR)
    teacher = GuidedTeacher(exact, exact, {"label": torch.tensor(MIXTURE.classes)})
    scheduler, z = stock_scheduler(LINEAR), NOISE
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        t = ((timestep + 1) / LINEAR.timesteps).to(z).expand(len(z))
        z = scheduler.step(teacher(z, t, {"label": LABEL}, W), int(timestep), z).prev_sample
    assert apart(samples("ddim", steps, LINEAR), z) < 1e-5


@pytest.mark.parametrize("schedule", [COSINE, LINEAR], ids=["cosine", "linear"])
def test_a_scheduler_has_the_alphas_of_the_schedule(schedule: Schedule) -> None:
    for sampler in ("dpm-solver++", "unipc"):
        alphas = torch.from_numpy(scheduler_for(sampler, schedule).alphas_cumprod).sqrt()
        assert torch.allclose(alphas, schedule.alphas[1:], rtol=1e-4)


@pytest.mark.parametrize("sampler", SOLVERS)
def test_more_steps_than_timesteps_are_refused(sampler: Solver) -> None:
    with pytest.raises(ValueError, match="1025 steps cannot be taken on 1024 timesteps"):
        samples(sampler, 1025)
