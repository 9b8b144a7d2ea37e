"""The laws of the formulas: inverses, composition, agreement with the stock scheduler."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from training import diffusion
from training.diffusion import Schedule

SCHEDULE = Schedule.cosine(1024)
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


@given(st.sampled_from([1, 2, 4, 8, 16, 32]), st.data())
def test_implied_x_inverts_a_ddim_step(steps: int, data: st.DataObject) -> None:
    i = data.draw(st.integers(1, steps)) * (1024 // steps)
    z, v = draw(2, 3)
    now, following = alpha_sigma(i), alpha_sigma(i - 1024 // steps)
    z_next = diffusion.ddim_step(z, v, *now, *following)
    assert close(diffusion.implied_x(z, z_next, *now, *following), diffusion.x_from_v(z, v, *now), 1e-7)


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


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 64, 1024])
def test_grid_is_the_stock_schedulers_trailing_timesteps(steps: int) -> None:
    scheduler = diffusion.cosine_scheduler(1024)
    scheduler.set_timesteps(steps)
    grid = SCHEDULE.grid(steps)
    assert grid.steps == steps
    assert (grid.times[:-1] * 1024 - 1).tolist() == scheduler.timesteps.tolist()
    assert grid.times[-1] == 0


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_ddim_step_is_the_stock_schedulers(steps: int) -> None:
    scheduler = diffusion.cosine_scheduler(1024)
    scheduler.set_timesteps(steps)
    grid = SCHEDULE.grid(steps)
    z, v = (value.float() for value in draw(0, 1))
    for k, timestep in enumerate(scheduler.timesteps):
        ours = diffusion.ddim_step(z, v, grid.alphas[k], grid.sigmas[k], grid.alphas[k + 1], grid.sigmas[k + 1])
        assert torch.allclose(scheduler.step(v, timestep, z).prev_sample, ours, atol=1e-5)
        z = ours


@pytest.mark.parametrize("steps", [0, -1, 3, 50, 2048])
def test_grid_refuses_steps_that_do_not_divide(steps: int) -> None:
    with pytest.raises(ValueError, match="do not divide"):
        SCHEDULE.grid(steps)


@pytest.mark.parametrize("steps", [1, 2, 64, 1024])
def test_spaced_is_the_grid_where_there_is_one(steps: int) -> None:
    for ours, exact in zip(vars(SCHEDULE.spaced(steps)).values(), vars(SCHEDULE.grid(steps)).values(), strict=True):
        assert torch.equal(ours, exact)


@pytest.mark.parametrize("steps", [3, 50, 1000])
def test_spaced_takes_the_nearest_timesteps(steps: int) -> None:
    grid = SCHEDULE.spaced(steps)
    assert grid.steps == steps
    assert (grid.times[0], grid.times[-1]) == (1, 0)
    exact = 1 - torch.arange(steps + 1) / steps
    assert (grid.times - exact).abs().max() <= 0.5 / 1024 + 1e-6
    assert (grid.times.diff() < 0).all()
    timesteps = (grid.times * 1024).long()
    assert torch.equal(timesteps / 1024, grid.times)
    assert torch.equal(grid.alphas, SCHEDULE.alphas[timesteps])
    assert torch.equal(grid.sigmas, SCHEDULE.sigmas[timesteps])


@pytest.mark.parametrize("steps", [0, -1, 1025])
def test_spaced_refuses_more_steps_than_timesteps(steps: int) -> None:
    with pytest.raises(ValueError, match="cannot be taken"):
        SCHEDULE.spaced(steps)
