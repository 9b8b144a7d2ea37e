"""The samplers with an exact denoiser: edits, kept regions, noise in between, encoding and transfer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from training.diffusion import Schedule, ddim_step, diffuse, renoise
from training.draws import generator_at
from training.guidance import Condition, GuidedTeacher
from training.mixture import ExactDenoiser, GaussianMixture
from training.sampler import Kept, Leg, encode, fresh_from, noised, sample, sample_stochastic, transfer

SCHEDULE = Schedule.cosine()
MIXTURE = GaussianMixture.on_a_circle(2)
EXACT = ExactDenoiser(MIXTURE, SCHEDULE)
TEACHER = GuidedTeacher(EXACT, EXACT, {"label": torch.tensor(MIXTURE.classes)})
ROWS = 200
NOISE = torch.randn(ROWS, 2, generator=generator_at(0, 0), dtype=torch.float64)
LABEL = {"label": torch.arange(ROWS) % MIXTURE.classes}
NONE, SOME = torch.zeros(ROWS, dtype=torch.float64), torch.linspace(0, 4, ROWS, dtype=torch.float64)


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_a_sample_can_be_finished_from_any_place() -> None:
    grid = SCHEDULE.grid(16)
    whole, z = sample(TEACHER, grid, NOISE, LABEL, SOME), NOISE
    for k in range(5):
        v = TEACHER(z, grid.times[k].double().expand(ROWS), LABEL, SOME)
        now, then = ((grid.alphas[i].double(), grid.sigmas[i].double()) for i in (k, k + 1))
        z = ddim_step(z, v, *now, *then)
    assert torch.allclose(sample(TEACHER, grid, z, LABEL, SOME, start=5), whole, atol=1e-6)


def test_an_edit_begins_at_the_noise_of_its_place_and_stays_near() -> None:
    x, labels = MIXTURE.draw(ROWS, generator_at(1, 0))
    grid = SCHEDULE.grid(64)
    assert torch.equal(noised(grid, x, NOISE, 64), x)
    edits = [
        sample(TEACHER, grid, noised(grid, x, NOISE, start), {"label": labels}, NONE, start=start)
        for start in (60, 40, 0)
    ]
    distances = [apart(edit, x) for edit in edits]
    assert distances[0] < 0.2
    assert distances == sorted(distances)


def test_what_is_kept_comes_back_exactly_and_the_rest_fits_it() -> None:
    x, labels = MIXTURE.draw(ROWS, generator_at(1, 0))
    keep = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(ROWS, 2)
    grid = SCHEDULE.grid(64)
    made = sample(TEACHER, grid, NOISE, {"label": labels}, NONE, kept=Kept(x, keep, NOISE))
    assert torch.equal(made[:, 0], x[:, 0])
    assert not torch.allclose(made[:, 1], x[:, 1])


def test_the_stochastic_sampler_asks_at_every_time_of_its_grid_once() -> None:
    times = []

    def denoiser(z: Tensor, t: Tensor, condition: Condition, w: Tensor) -> Tensor:
        times.append(float(t[0]))
        return EXACT(z, t, condition, w)

    sample_stochastic(denoiser, SCHEDULE.grid(8), NOISE, LABEL, NONE, fresh_from(generator_at(2, 0)))
    assert times == [k / 8 for k in range(8, 0, -1)]


def test_a_stochastic_step_goes_two_places_on_and_noises_one_back() -> None:
    grid = SCHEDULE.grid(2)
    alphas, sigmas = grid.alphas.double(), grid.sigmas.double()
    made = sample_stochastic(EXACT, grid, NOISE, LABEL, NONE, fresh_from(generator_at(2, 0)))
    v = EXACT(NOISE, torch.ones(ROWS, dtype=torch.float64), LABEL, NONE)
    clean = ddim_step(NOISE, v, alphas[0], sigmas[0], alphas[2], sigmas[2])
    fresh = torch.randn(NOISE.shape, generator=generator_at(2, 0)).to(NOISE)
    z = renoise(clean, fresh, alphas[2], sigmas[2], alphas[1], sigmas[1])
    assert torch.allclose(z, diffuse(clean, fresh, alphas[1], sigmas[1]))
    v = EXACT(z, torch.full((ROWS,), 0.5, dtype=torch.float64), LABEL, NONE)
    assert torch.allclose(made, ddim_step(z, v, alphas[1], sigmas[1], alphas[2], sigmas[2]))


def test_many_stochastic_steps_draw_from_the_data() -> None:
    """The mean and the spread of each class are those of the mixture."""
    noise = torch.randn(4000, 2, generator=generator_at(3, 0), dtype=torch.float64)
    label = torch.arange(4000) % MIXTURE.classes
    w = torch.zeros(4000, dtype=torch.float64)
    made = sample_stochastic(EXACT, SCHEDULE.grid(128), noise, {"label": label}, w, fresh_from(generator_at(4, 0)))
    x, labels = MIXTURE.draw(40_000, generator_at(5, 0))
    for k in range(MIXTURE.classes):
        assert (made[label == k].mean(0) - x[labels == k].mean(0)).abs().max() < 0.08
        assert (made[label == k].std(0) - x[labels == k].std(0)).abs().max() < 0.08


@pytest.mark.parametrize(("steps", "tolerance"), [(64, 0.1), (512, 0.02)])
def test_encoding_finds_the_noise_of_a_sample(steps: int, tolerance: float) -> None:
    grid = SCHEDULE.grid(steps)
    made = sample(TEACHER, SCHEDULE.grid(1024), NOISE, LABEL, NONE)
    assert apart(encode(TEACHER, grid, made, LABEL, NONE), NOISE) < tolerance


def test_transfer_keeps_the_noise_and_changes_the_class() -> None:
    grid = SCHEDULE.grid(512)
    other = {"label": (LABEL["label"] + 1) % MIXTURE.classes}
    made = sample(TEACHER, grid, NOISE, LABEL, NONE)
    there, back = Leg(TEACHER, grid, LABEL, NONE), Leg(TEACHER, grid, other, NONE)
    assert apart(transfer(made, there, back), sample(TEACHER, grid, NOISE, other, NONE)) < 0.05
    assert apart(transfer(made, there, there), made) < 0.03
