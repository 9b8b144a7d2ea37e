"""The losses against exact answers: a teacher known in closed form, and targets computed by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from training import losses
from training.diffusion import Schedule, ddim_step, diffuse, x_from_v
from training.guidance import Condition, Denoiser, GuidedTeacher
from training.loop import generator_at
from training.losses import Batch

SCHEDULE = Schedule.cosine(1024)
NULL = {"label": torch.tensor(2)}


def gaussian_v(z: Tensor, t: Tensor, condition: Condition, w: Tensor) -> Tensor:
    """The exact v for data N(mean of the label, 1): then z_t ~ N(alpha mean, 1) and v = -sigma mean."""
    alpha, sigma = SCHEDULE.at(t, z)
    mean = condition["label"].to(z).reshape(-1, 1, 1, 1) - 1
    return alpha * sigma * (z - alpha * mean) - sigma * (mean + alpha * (z - alpha * mean))


def batch(rows: int = 64) -> Batch:
    generator = generator_at(0, 0)
    label = torch.randint(0, 2, (rows,), generator=generator)
    x = torch.randn(rows, 1, 2, 2, generator=generator) + label.reshape(-1, 1, 1, 1) - 1
    return Batch(x, {"label": label})


def test_draws_are_repeatable_and_in_range() -> None:
    like = torch.zeros(1000, 2)
    t = losses.draw_times(like, 8, generator_at(0, 1))
    w = losses.draw_guidance(like, (1.0, 3.0), generator_at(0, 1))
    assert torch.equal(t, losses.draw_times(like, 8, generator_at(0, 1)))
    assert not torch.equal(t, losses.draw_times(like, 8, generator_at(0, 2)))
    assert set((t * 8).tolist()) == set(range(1, 9))
    assert 1 <= w.min() < 1.1 < 2.9 < w.max() <= 3


def test_drop_condition_replaces_about_the_share() -> None:
    label = torch.zeros(2000, dtype=torch.long)
    dropped = losses.drop_condition({"label": label}, NULL, 0.1, generator_at(0, 0))["label"]
    assert set(dropped.tolist()) == {0, 2}
    assert 0.07 < (dropped == 2).float().mean() < 0.13


@pytest.mark.parametrize("index", [1, 100, 512, 900, 1024])
def test_truncated_snr_is_the_larger_of_the_two_errors(index: int) -> None:
    alpha, sigma = (value.reshape(1, 1).double() for value in (SCHEDULE.alphas[index], SCHEDULE.sigmas[index]))
    z, x, target = (torch.randn(1, 5, generator=generator_at(s, 0)).double() for s in range(3))
    errors = (
        (x - target).square().mean(),
        ((z - alpha * x) / sigma - (z - alpha * target) / sigma).square().mean(),
    )
    assert torch.allclose(losses.truncated_snr_loss(x, target, alpha, sigma), torch.stack(errors).max())


def test_teacher_loss_is_least_at_the_exact_denoiser() -> None:
    def off_by(scale: float) -> float:
        def network(z: Tensor, t: Tensor, condition: Condition, w: Tensor) -> Tensor:
            return gaussian_v(z, t, condition, w) * scale

        return float(
            losses.teacher_loss(network, SCHEDULE, batch(2000), {"label": torch.tensor(1)}, 1e-6, generator_at(0, 3))
        )

    assert off_by(1.0) < min(off_by(0.8), off_by(1.2))


def test_output_matching_is_zero_for_the_guided_teacher_itself_and_passes_w() -> None:
    teacher = GuidedTeacher(gaussian_v, gaussian_v, NULL)
    exact = losses.output_matching_loss(teacher, teacher, SCHEDULE, batch(), (0.0, 4.0), generator_at(0, 4))
    unguided = losses.output_matching_loss(gaussian_v, teacher, SCHEDULE, batch(), (0.0, 4.0), generator_at(0, 4))
    assert exact == 0
    assert unguided > 0.1
    assert losses.output_matching_loss(gaussian_v, teacher, SCHEDULE, batch(), (0.0, 0.0), generator_at(0, 4)) < 1e-10


@pytest.mark.parametrize("steps", [1, 2, 4, 16])
def test_two_step_target_carries_one_step_where_two_lead(steps: int) -> None:
    rows = batch(steps)
    t = torch.arange(1, steps + 1) / steps
    w = torch.linspace(0, 3, steps)
    teacher = GuidedTeacher(gaussian_v, gaussian_v, NULL)
    now, half, following = (SCHEDULE.at(time, rows.x) for time in (t, t - 0.5 / steps, t - 1 / steps))
    z = diffuse(rows.x, torch.randn(rows.x.shape, generator=generator_at(5, 0)), *now)
    z_half = ddim_step(z, teacher(z, t, rows.condition, w), *now, *half)
    v_half = teacher(z_half, t - 0.5 / steps, rows.condition, w)
    two = ddim_step(z_half, v_half, *half, *following)

    target = losses.two_step_target(teacher, SCHEDULE, z, t, steps, rows.condition, w)
    eps = (z - now[0] * target) / now[1]
    assert torch.allclose(diffuse(target, eps, *following), two, atol=1e-4)
    assert torch.allclose(target[0], x_from_v(z_half, v_half, *half)[0], atol=1e-5), "at t'' = 0, the teacher's x"


def test_progressive_loss_is_zero_for_a_teacher_whose_steps_compose() -> None:
    """Data of one point: its x is the same everywhere, so every DDIM step is exact and a student needs no change."""

    def point(z: Tensor, t: Tensor, condition: Condition, w: Tensor) -> Tensor:
        alpha, sigma = SCHEDULE.at(t, z)
        return (alpha * z - 0.5) / sigma

    loss = losses.progressive_loss(point, point, SCHEDULE, batch(), 8, (0.0, 4.0), generator_at(0, 6))
    assert loss < 1e-6


class Recorder:
    """A denoiser that remembers what it was asked, and answers with what another would."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.calls: list[tuple[Tensor, Tensor, Condition, Tensor]] = []

    def __call__(self, z: Tensor, t: Tensor, condition: Condition, w: Tensor) -> Tensor:
        self.calls.append((z, t, condition, w))
        return self.denoiser(z, t, condition, w)


def test_the_teacher_sees_the_null_condition_at_times_and_every_timestep() -> None:
    seen = Recorder(gaussian_v)
    losses.teacher_loss(seen, SCHEDULE, batch(2000), NULL, 0.25, generator_at(0, 7))
    (_, t, condition, _), label = seen.calls[0], batch(2000).condition["label"]
    dropped = condition["label"] == 2
    assert 0.2 < dropped.float().mean() < 0.3
    assert torch.equal(condition["label"][~dropped], label[~dropped])
    assert t.min() < 0.01
    assert t.max() > 0.99


def test_output_matching_asks_both_the_same_and_weighs_by_truncated_snr() -> None:
    teacher = Recorder(GuidedTeacher(gaussian_v, gaussian_v, NULL))
    student = Recorder(gaussian_v)
    loss = losses.output_matching_loss(student, teacher, SCHEDULE, batch(), (1.0, 4.0), generator_at(0, 8))
    for asked, answered in zip(student.calls[0], teacher.calls[0], strict=True):
        assert asked is answered
    z, t, condition, w = student.calls[0]
    assert w.min() >= 1
    alpha, sigma = SCHEDULE.at(t, z)
    apart = [x_from_v(z, denoiser(z, t, condition, w), alpha, sigma) for denoiser in (gaussian_v, teacher.denoiser)]
    squared = (apart[0] - apart[1]).square().flatten(1).mean(1)
    assert torch.allclose(loss, (squared * (alpha / sigma).square().flatten().clamp(min=1)).mean())


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_progressive_distillation_asks_on_the_grids_with_one_w(steps: int) -> None:
    """The student at the times of its own grid, the teacher there and half a step on, all with the same w."""
    teacher, student = Recorder(GuidedTeacher(gaussian_v, gaussian_v, NULL)), Recorder(gaussian_v)
    losses.progressive_loss(student, teacher, SCHEDULE, batch(500), steps, (1.0, 4.0), generator_at(0, 9))
    ((z, t, _, w),) = student.calls
    first, second = teacher.calls
    assert set((t * steps).tolist()) == set(range(1, steps + 1))
    assert torch.equal(first[0], z)
    assert torch.equal(first[1], t)
    assert torch.equal(second[1], t - 0.5 / steps)
    assert w.min() >= 1
    assert torch.equal(first[3], w)
    assert torch.equal(second[3], w)
