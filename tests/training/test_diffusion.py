"""The laws of the formulas: inverses, composition, agreement with the stock scheduler."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from engines.paths import Level
from engines.rows import renoise
from training import diffusion
from training.diffusion import Schedule
from training.sections import OwnPrediction

SCHEDULE = Schedule.cosine(1024)
SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "cosine": Schedule.cosine,
    "cosine-1000": lambda: Schedule.cosine(1000),
    "continuous-cosine": Schedule.continuous_cosine,
    "scaled-linear": Schedule.scaled_linear,
    "rectified-flow": Schedule.rectified_flow,
    "shifted-flow": lambda: Schedule.rectified_flow(1000, 3.0),
}
INDICES = st.integers(1, SCHEDULE.timesteps)


def draw(*seeds: int) -> list[Tensor]:
    return [torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]


def alpha_sigma(index: int) -> tuple[Tensor, Tensor]:
    """In float64 and exactly on the unit circle, so that the laws can be held to 1e-9."""
    alpha = SCHEDULE.alphas[index].double()
    return alpha, (1 - alpha**2).sqrt()


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> bool:
    return bool(torch.allclose(a, b, rtol=0, atol=tolerance))


@given(INDICES)
def test_conversions_invert_one_another(index: int) -> None:
    x, eps = draw(0, 1)
    alpha, sigma = alpha_sigma(index)
    z, v = diffusion.diffuse(x, eps, alpha, sigma), diffusion.v_from(x, eps, alpha, sigma)
    assert close(diffusion.x_from_v(z, v, alpha, sigma), x)
    assert close(diffusion.eps_from_v(z, v, alpha, sigma), eps)


@given(INDICES, st.integers(0, 1023))
def test_ddim_step_of_the_true_v_stays_on_the_path(index: int, earlier: int) -> None:
    x, eps = draw(0, 1)
    now, following = alpha_sigma(index), alpha_sigma(min(earlier, index - 1))
    z = diffusion.diffuse(x, eps, *now)
    stepped = diffusion.ddim_step(z, diffusion.v_from(x, eps, *now), *now, *following)
    assert close(stepped, diffusion.diffuse(x, eps, *following))


@given(st.integers(2, SCHEDULE.timesteps), st.data())
def test_ddim_steps_of_one_prediction_compose(index: int, data: st.DataObject) -> None:
    """With x and eps held fixed, two steps lead where one does."""
    middle = data.draw(st.integers(1, index - 1))
    last = data.draw(st.integers(0, middle - 1))
    z, v = draw(2, 3)
    now, half, following = alpha_sigma(index), alpha_sigma(middle), alpha_sigma(last)
    x, eps = diffusion.x_from_v(z, v, *now), diffusion.eps_from_v(z, v, *now)
    z_half = diffusion.ddim_step(z, v, *now, *half)
    two = diffusion.ddim_step(z_half, diffusion.v_from(x, eps, *half), *half, *following)
    assert close(two, diffusion.ddim_step(z, v, *now, *following))


@given(st.integers(0, SCHEDULE.timesteps), st.integers(0, SCHEDULE.timesteps))
def test_implied_v_inverts_a_ddim_step_either_way(index: int, other: int) -> None:
    assume(index != other)
    z, v = draw(2, 3)
    now, following = alpha_sigma(index), alpha_sigma(other)
    z_next = diffusion.ddim_step(z, v, *now, *following)
    assert close(diffusion.implied_v(z, z_next, *now, *following), v, 1e-7)


@given(INDICES, st.integers(0, 1023))
def test_a_ddim_step_forth_and_back_with_the_same_x_and_eps_is_none(index: int, earlier: int) -> None:
    z, v = draw(2, 3)
    now, following = alpha_sigma(index), alpha_sigma(min(earlier, index - 1))
    x, eps = diffusion.x_from_v(z, v, *now), diffusion.eps_from_v(z, v, *now)
    there = diffusion.ddim_step(z, v, *now, *following)
    assert close(diffusion.ddim_step(there, diffusion.v_from(x, eps, *following), *following, *now), z)


@given(st.integers(1, 1023), st.sampled_from(["v", "eps", "x", "flow"]))
def test_v_is_had_from_every_prediction(index: int, prediction: diffusion.Prediction) -> None:
    x, eps = draw(0, 1)
    alpha, sigma = alpha_sigma(index)
    z, v = diffusion.diffuse(x, eps, alpha, sigma), diffusion.v_from(x, eps, alpha, sigma)
    output = {"v": v, "eps": eps, "x": x, "flow": eps - x}[prediction]
    assert close(diffusion.TO_V[prediction](z, output, alpha, sigma), v, 1e-9 / float(min(alpha, sigma)))


@given(st.integers(0, 1022), st.data())
def test_renoising_leads_to_the_later_time_in_one_leap_or_two(index: int, data: st.DataObject) -> None:
    """Of z_t about x, the mean is alpha_t x and the variance sigma_t^2; both follow from those of z_s."""
    now, later = alpha_sigma(index), alpha_sigma(data.draw(st.integers(index + 1, 1024)))
    x, zero, one = draw(0)[0], torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert close(diffusion.renoise(now[0] * x, zero, *now, *later), later[0] * x)
    kept, added = diffusion.renoise(now[1], zero, *now, *later), diffusion.renoise(zero, one, *now, *later)
    assert close(kept.square() + added.square(), later[1].square())


@given(INDICES, INDICES)
def test_noise_is_added_as_the_engines_add_it(i: int, j: int) -> None:
    assume(i < j)
    z, noise = draw(0, 1)
    now, later = (Level(float(SCHEDULE.alphas[k]), float(SCHEDULE.sigmas[k])) for k in (i, j))
    ours = diffusion.renoise(z.float(), noise.float(), *map(torch.tensor, (*now, *later)))
    assert np.abs(renoise(z.float().numpy(), noise.float().numpy(), now, later) - ours.numpy()).max() < 2e-3


def test_blend_known_keeps_exactly_and_only_what_it_should() -> None:
    z, known, noise = draw(0, 1, 2)
    alpha, sigma = alpha_sigma(300)
    keep = torch.zeros(3, 1, 4, 4, dtype=torch.float64)
    keep[:, :, :2] = 1
    blended = diffusion.blend_known(z, known, keep, noise, alpha, sigma)
    assert torch.equal(blended[:, :, 2:], z[:, :, 2:])
    assert torch.equal(blended[:, :, :2], diffusion.diffuse(known, noise, alpha, sigma)[:, :, :2])
    clean = diffusion.blend_known(z, known, keep, noise, torch.tensor(1.0), torch.tensor(0.0))
    assert torch.equal(clean[:, :, :2], known[:, :, :2])


def test_schedule_preserves_variance_and_falls_from_clean_to_noise() -> None:
    assert torch.allclose(SCHEDULE.alphas**2 + SCHEDULE.sigmas**2, torch.ones(1025))
    assert (SCHEDULE.alphas.diff() < 0).all()
    assert (SCHEDULE.sigmas.diff() >= 0).all()
    assert (SCHEDULE.alphas[0], SCHEDULE.sigmas[0]) == (1.0, 0.0)
    assert SCHEDULE.alphas[-1] < 1e-3


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_every_schedule_preserves_variance_and_goes_from_clean_to_noise(make: Callable[[], Schedule]) -> None:
    schedule = make()
    assert torch.allclose(schedule.alphas.square() + schedule.sigmas.square(), torch.ones(schedule.timesteps + 1))
    assert (schedule.angles.diff() > 0).all()
    assert (schedule.alphas[0], schedule.sigmas[0]) == (1.0, 0.0)
    assert schedule.alphas[-1] < 0.07


def test_continuous_cosine_is_the_cosine_at_every_time() -> None:
    t = torch.rand(100, generator=torch.Generator().manual_seed(0))
    alpha, sigma = Schedule.continuous_cosine(64).at(t, torch.empty(100))
    assert torch.allclose(alpha, (t.double() * math.pi / 2).cos().float(), atol=1e-6)
    assert torch.allclose(sigma, (t.double() * math.pi / 2).sin().float(), atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_rectified_flow_is_the_straight_line_scaled(shift: float) -> None:
    t = torch.rand(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s = shift * t / (1 + (shift - 1) * t)
    size = ((1 - s).square() + s.square()).sqrt()
    alpha, sigma = Schedule.rectified_flow(1000, shift).at(t, torch.empty(100, dtype=torch.float64))
    assert torch.allclose(alpha, (1 - s) / size, atol=1e-5)
    assert torch.allclose(sigma, s / size, atol=1e-5)


def test_scaled_linear_is_stable_diffusions() -> None:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    expected = (1 - betas).cumprod(0).sqrt().float()
    assert torch.allclose(Schedule.scaled_linear().alphas[1:], expected, atol=1e-5)
    assert abs(Schedule.scaled_linear().alphas[-1] - 0.0682) < 1e-3


@pytest.mark.parametrize("alphas_cumprod", [[0.9, 0.95, 0.1], [1.0, 0.5], [0.9, -0.1], [0.9, float("nan")]])
def test_what_is_no_schedule_is_refused(alphas_cumprod: list[float]) -> None:
    with pytest.raises(ValueError, match="alphas_cumprod must fall"):
        Schedule.from_alphas_cumprod(torch.tensor(alphas_cumprod))


@pytest.mark.parametrize("shift", [0.0, -1.0, math.inf, math.nan])
def test_a_flow_with_a_faulty_shift_is_refused(shift: float) -> None:
    with pytest.raises(ValueError, match="shift"):
        Schedule.rectified_flow(1000, shift)


@given(st.integers(0, 1000), st.floats(0, 1))
def test_between_timesteps_the_angle_is_between_those_beside(index: int, part: float) -> None:
    schedule = Schedule.scaled_linear()
    t = torch.tensor((min(index, 999) + part) / 1000, dtype=torch.float64)
    low, high = schedule.angles[min(index, 999)], schedule.angles[min(index, 999) + 1]
    assert low - 1e-12 <= schedule.angle(t) <= high + 1e-12


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("prediction", ["v", "x"])
def test_our_steps_are_the_stock_schedulers(
    make: Callable[[], Schedule], steps: int, prediction: OwnPrediction
) -> None:
    schedule = make()
    scheduler = diffusion.stock_scheduler(schedule, prediction)
    scheduler.set_timesteps(steps)
    grid = schedule.grid(steps)
    assert (grid.times[:-1] * schedule.timesteps - 1).tolist() == scheduler.timesteps.tolist()
    assert grid.times[-1] == 0
    z, v = (value.float() for value in draw(0, 1))
    for k, timestep in enumerate(scheduler.timesteps):
        ours = diffusion.ddim_step(z, v, grid.alphas[k], grid.sigmas[k], grid.alphas[k + 1], grid.sigmas[k + 1])
        output = v if prediction == "v" else diffusion.x_from_v(z, v, grid.alphas[k], grid.sigmas[k])
        assert torch.allclose(scheduler.step(output, timestep, z).prev_sample, ours, atol=2e-5)
        z = ours


@pytest.mark.parametrize("steps", [64, 1024])
def test_many_steps_are_the_stock_schedulers_timesteps(steps: int) -> None:
    scheduler = diffusion.stock_scheduler(SCHEDULE)
    scheduler.set_timesteps(steps)
    assert (SCHEDULE.grid(steps).times[:-1] * 1024 - 1).tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("steps", [3, 40, 50, 1000])
def test_a_grid_may_have_any_number_of_steps(steps: int) -> None:
    grid = SCHEDULE.grid(steps)
    assert grid.steps == steps
    assert torch.allclose(grid.times, 1 - torch.arange(steps + 1) / steps)
    assert torch.allclose(grid.alphas.square() + grid.sigmas.square(), torch.ones(steps + 1))
    assert (grid.alphas.diff() > 0).all()


@pytest.mark.parametrize("steps", [8, 40])
def test_halved_grids_share_their_times(steps: int) -> None:
    fine, coarse = Schedule.scaled_linear().grid(steps), Schedule.scaled_linear().grid(steps // 2)
    for name in ("times", "alphas", "sigmas"):
        assert torch.allclose(getattr(fine, name)[::2], getattr(coarse, name))


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_are_no_grid(steps: int) -> None:
    with pytest.raises(ValueError, match="are not a grid"):
        SCHEDULE.grid(steps)
