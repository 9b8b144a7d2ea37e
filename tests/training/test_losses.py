"""The losses against exact answers: a teacher known in closed form, and targets computed by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from training import losses
from training.diffusion import Schedule, ddim_step, diffuse, eps_from_v, x_from_v
from training.draws import Draws, generator_at
from training.guidance import Condition, Denoiser, GuidedTeacher
from training.losses import Batch

SCHEDULE = Schedule.cosine(1024)
NULL = {"label": torch.tensor(2)}


def gaussian_v(z: Tensor, t: Tensor, condition: Condition, w: Tensor) -> Tensor:
    """The exact v for data N(mean of the label, 1): then z_t ~ N(alpha mean, 1) and v = -sigma mean."""
    alpha, sigma = SCHEDULE.at(t, z)
    mean = condition["label"].to(z).reshape(-1, 1, 1, 1) - 1
    return alpha * sigma * (z - alpha * mean) - sigma * (mean + alpha * (z - alpha * mean))


def draws(update: int, rows: int = 64) -> Draws:
    return Draws(0, update, range(rows))


def batch(rows: int = 64) -> Batch:
    generator = generator_at(0, 0)
    label = torch.randint(0, 2, (rows,), generator=generator)
    x = torch.randn(rows, 1, 2, 2, generator=generator) + label.reshape(-1, 1, 1, 1) - 1
    return Batch(x, {"label": label})


def test_draws_are_repeatable_and_in_range() -> None:
    t = losses.draw_times(8, draws(1, 1000))
    w = losses.draw_guidance((1.0, 3.0), draws(1, 1000))
    assert torch.equal(t, losses.draw_times(8, draws(1, 1000)))
    assert not torch.equal(t, losses.draw_times(8, draws(2, 1000)))
    assert set((t * 8).tolist()) == set(range(1, 9))
    assert 1 <= w.min() < 1.1 < 2.9 < w.max() <= 3


def test_drop_condition_replaces_about_the_share() -> None:
    label = torch.zeros(2000, dtype=torch.long)
    dropped = losses.drop_condition({"label": label}, NULL, 0.1, draws(0, 2000))["label"]
    assert set(dropped.tolist()) == {0, 2}
    assert 0.07 < (dropped == 2).float().mean() < 0.13


@pytest.mark.parametrize("index", [1, 100, 512, 900, 1024])
def test_truncated_snr_is_the_larger_of_the_two_errors(index: int) -> None:
    alpha, sigma, z, v, target = two_predictions(index)
    errors = [
        (convert(z, v, alpha, sigma) - convert(z, target, alpha, sigma)).square().mean()
        for convert in (x_from_v, eps_from_v)
    ]
    loss = losses.weighted_loss(v, target, alpha, sigma, "truncated-snr")
    assert torch.allclose(loss, torch.stack(errors).max())


def two_predictions(index: int) -> list[Tensor]:
    """Alpha, sigma, z and two predictions of v, in float64."""
    values = [value.reshape(1, 1).double() for value in (SCHEDULE.alphas[index], SCHEDULE.sigmas[index])]
    return values + [torch.randn(1, 5, generator=generator_at(seed, 0)).double() for seed in range(3)]


@pytest.mark.parametrize("index", [1, 100, 512, 900, 1024])
@pytest.mark.parametrize("weighting", losses.WEIGHTINGS)
def test_weightings_are_functions_of_the_snr_times_the_squared_error_of_x(
    weighting: losses.Weighting, index: int
) -> None:
    alpha, sigma, z, v, target = two_predictions(index)
    snr = (alpha / sigma) ** 2
    omega = {
        "truncated-snr": snr.clamp(min=1),
        "clamped-snr": snr.clamp(1, 30),
        "snr-plus-one": snr + 1,
        "uniform": torch.ones_like(snr),
    }[weighting]
    squared = (x_from_v(z, v, alpha, sigma) - x_from_v(z, target, alpha, sigma)).square().mean()
    assert torch.allclose(losses.weighted_loss(v, target, alpha, sigma, weighting), omega.squeeze() * squared)


@pytest.mark.parametrize("weighting", ["truncated-snr", "snr-plus-one"])
def test_the_loss_is_finite_and_heeds_v_on_clean_data(weighting: losses.Weighting) -> None:
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    loss = losses.weighted_loss(torch.ones(1, 4), torch.zeros(1, 4), one, zero, weighting)
    assert loss == 1


def test_teacher_loss_is_least_at_the_exact_denoiser() -> None:
    def off_by(scale: float) -> float:
        def network(z: Tensor, t: Tensor, condition: Condition, w: Tensor) -> Tensor:
            return gaussian_v(z, t, condition, w) * scale

        return float(
            losses.teacher_loss(network, SCHEDULE, batch(2000), {"label": torch.tensor(1)}, 1e-6, draws(3, 2000))
        )

    assert off_by(1.0) < min(off_by(0.8), off_by(1.2))


def test_output_matching_is_zero_for_the_guided_teacher_itself_and_passes_w() -> None:
    teacher = GuidedTeacher(gaussian_v, gaussian_v, NULL)
    exact = losses.output_matching_loss(teacher, teacher, SCHEDULE, batch(), (0.0, 4.0), draws(4))
    unguided = losses.output_matching_loss(gaussian_v, teacher, SCHEDULE, batch(), (0.0, 4.0), draws(4))
    assert exact == 0
    assert unguided > 0.1
    assert losses.output_matching_loss(gaussian_v, teacher, SCHEDULE, batch(), (0.0, 0.0), draws(4)) < 1e-10


@pytest.mark.parametrize("steps", [1, 2, 4, 16])
def test_the_target_carries_one_step_where_two_lead(steps: int) -> None:
    rows = batch(steps)
    t = torch.arange(1, steps + 1) / steps
    w = torch.linspace(0, 3, steps)
    teacher = GuidedTeacher(gaussian_v, gaussian_v, NULL)
    now, half, following = (SCHEDULE.at(time, rows.x) for time in (t, t - 0.5 / steps, t - 1 / steps))
    z = diffuse(rows.x, torch.randn(rows.x.shape, generator=generator_at(5, 0)), *now)
    z_half = ddim_step(z, teacher(z, t, rows.condition, w), *now, *half)
    v_half = teacher(z_half, t - 0.5 / steps, rows.condition, w)
    two = ddim_step(z_half, v_half, *half, *following)

    target = losses.target_along(teacher, SCHEDULE, z, (t, t - 0.5 / steps, t - 1 / steps), rows.condition, w)
    assert torch.allclose(ddim_step(z, target, *now, *following), two, atol=1e-5)
    x = x_from_v(z, target, *now)[0]
    assert torch.allclose(x, x_from_v(z_half, v_half, *half)[0], atol=1e-4), "at t'' = 0, the teacher's x"


@pytest.mark.parametrize("replaced", [2, 3, 5])
@pytest.mark.parametrize("course", ["deterministic", "encoding"])
def test_a_step_may_replace_any_number_of_the_teachers(replaced: int, course: losses.Course) -> None:
    steps, teacher = 4, Recorder(GuidedTeacher(gaussian_v, gaussian_v, NULL))
    student = Recorder(lambda z, t, condition, w: torch.zeros_like(z))
    loss = losses.progressive_loss(
        student, teacher, SCHEDULE, batch(64), steps, (0.0, 4.0), draws(9, 64), course=course, replaced=replaced
    )
    assert loss > 0
    ((z, t, condition, w),) = student.calls
    assert torch.allclose(t * steps, (t * steps).round())
    assert len(teacher.calls) == replaced
    way = 1 if course == "encoding" else -1
    for k, (seen, asked, _, same_w) in enumerate(teacher.calls):
        now, following = t + way * k / replaced / steps, t + way * (k + 1) / replaced / steps
        assert torch.allclose(asked, now, atol=1e-6)
        assert torch.equal(same_w, w)
        assert torch.allclose(seen, z, atol=1e-5)
        z = ddim_step(z, teacher.denoiser(z, now, condition, w), *SCHEDULE.at(now, z), *SCHEDULE.at(following, z))
    end = t + way / steps
    begin = student.calls[0][0]
    times = [t + way * k / replaced / steps for k in range(replaced + 1)]
    target = losses.target_along(teacher, SCHEDULE, begin, times, condition, w)
    assert torch.allclose(ddim_step(begin, target, *SCHEDULE.at(t, z), *SCHEDULE.at(end, z)), z, atol=1e-5)


def test_progressive_loss_is_zero_for_a_teacher_whose_steps_compose() -> None:
    """Data of one point: its x is the same everywhere, so every DDIM step is exact and a student needs no change."""
    for course in ("deterministic", "stochastic"):
        loss = losses.progressive_loss(point, point, SCHEDULE, batch(), 8, (0.0, 4.0), draws(6), course=course)
        assert loss < 1e-6


def point(z: Tensor, t: Tensor, condition: Condition, w: Tensor) -> Tensor:
    """The exact v of data that are 0.5 everywhere."""
    alpha, sigma = SCHEDULE.at(t, z)
    return (alpha * z - 0.5) / sigma


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
    losses.teacher_loss(seen, SCHEDULE, batch(2000), NULL, 0.25, draws(7, 2000))
    (_, t, condition, _), label = seen.calls[0], batch(2000).condition["label"]
    dropped = condition["label"] == 2
    assert 0.2 < dropped.float().mean() < 0.3
    assert torch.equal(condition["label"][~dropped], label[~dropped])
    assert t.min() < 0.01
    assert t.max() > 0.99


def test_output_matching_asks_both_the_same_and_weighs_by_truncated_snr() -> None:
    teacher = Recorder(GuidedTeacher(gaussian_v, gaussian_v, NULL))
    student = Recorder(gaussian_v)
    loss = losses.output_matching_loss(student, teacher, SCHEDULE, batch(), (1.0, 4.0), draws(8))
    for asked, answered in zip(student.calls[0], teacher.calls[0], strict=True):
        assert asked is answered
    z, t, condition, w = student.calls[0]
    assert w.min() >= 1
    alpha, sigma = SCHEDULE.at(t, z)
    v, target = (denoiser(z, t, condition, w) for denoiser in (gaussian_v, teacher.denoiser))
    assert torch.allclose(loss, losses.weighted_loss(v, target, alpha, sigma, "truncated-snr"))
    squared = (x_from_v(z, v, alpha, sigma) - x_from_v(z, target, alpha, sigma)).square().flatten(1).mean(1)
    assert torch.allclose(loss, (squared * (alpha / sigma).square().flatten().clamp(min=1)).mean(), rtol=1e-3)


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_progressive_distillation_asks_on_the_grids_with_one_w(steps: int) -> None:
    """The student at the times of its own grid, the teacher there and half a step on, all with the same w."""
    teacher, student = Recorder(GuidedTeacher(gaussian_v, gaussian_v, NULL)), Recorder(gaussian_v)
    losses.progressive_loss(student, teacher, SCHEDULE, batch(500), steps, (1.0, 4.0), draws(9, 500))
    ((z, t, _, w),) = student.calls
    first, second = teacher.calls
    assert torch.equal((t * steps).unique(), torch.arange(1.0, steps + 1))
    assert torch.equal(first[0], z)
    assert torch.equal(first[1], t)
    assert torch.allclose(second[1], t - 0.5 / steps)
    assert w.min() >= 1
    assert torch.equal(first[3], w)
    assert torch.equal(second[3], w)


def test_a_stochastic_student_starts_at_half_steps_and_goes_whole_ones() -> None:
    t, _, t_next = losses.draw_steps("stochastic", 4, draws(10, 500))
    assert torch.equal((t * 8).unique(), torch.arange(1.0, 9, dtype=torch.float64))
    assert torch.allclose(t - t_next, torch.where(t > 0.125, 0.25, 0.125).double())
    assert t_next.min() == 0


@pytest.mark.parametrize("steps", [1, 4, 5])
def test_a_stochastic_students_teacher_is_asked_on_its_grid_alone(steps: int) -> None:
    """And where the last step is one of the teacher's, its v is the target."""
    teacher = Recorder(GuidedTeacher(gaussian_v, gaussian_v, NULL))
    student = Recorder(lambda z, t, condition, w: torch.zeros_like(z))
    losses.progressive_loss(
        student, teacher, SCHEDULE, batch(500), steps, (1.0, 4.0), draws(9, 500), course="stochastic"
    )
    first, second = (t for _, t, _, _ in teacher.calls)
    for t in (first, second):
        assert torch.allclose(t * 2 * steps, (t * 2 * steps).round(), atol=1e-5)
        assert t.min() > 0
    ((z, t, condition, w),) = student.calls
    last = (t * 2 * steps).round() == 1
    assert torch.equal(last, first == second)
    assert 0 < last.float().mean() < 1
    target = losses.target_along(gaussian_v, SCHEDULE, z, (t, t, torch.zeros_like(t)), condition, w)
    assert torch.allclose(target, gaussian_v(z, t, condition, w), atol=1e-4)


@pytest.mark.parametrize("steps", [1, 3, 40])
def test_an_encoder_goes_the_steps_of_the_sampler_in_reverse(steps: int) -> None:
    forward, reverse = (losses.draw_steps(course, steps, draws(11, 2000)) for course in ("deterministic", "encoding"))
    assert all(torch.equal(a, b) for a, b in zip(forward, reversed(reverse), strict=True))
    assert reverse[0].min() == 0


def test_an_encoders_target_leads_where_two_steps_lead_from_clean_data_too() -> None:
    rows = batch(8)
    t, t_next = torch.arange(8) / 8, torch.arange(1, 9) / 8
    t_half = (t + t_next) / 2
    w = torch.linspace(0, 3, 8)
    teacher = GuidedTeacher(gaussian_v, gaussian_v, NULL)
    now, half, following = (SCHEDULE.at(time, rows.x) for time in (t, t_half, t_next))
    z = diffuse(rows.x, torch.randn(rows.x.shape, generator=generator_at(5, 0)), *now)
    z_half = ddim_step(z, teacher(z, t, rows.condition, w), *now, *half)
    two = ddim_step(z_half, teacher(z_half, t_half, rows.condition, w), *half, *following)
    target = losses.target_along(teacher, SCHEDULE, z, (t, t_half, t_next), rows.condition, w)
    assert torch.allclose(ddim_step(z, target, *now, *following), two, atol=1e-5)
    assert target.isfinite().all()


def test_one_network_with_a_null_condition_and_two_networks_give_the_same_student_losses() -> None:
    """Two paths, one answer: the unconditional network is the same function without the condition."""

    def unconditional(z: Tensor, t: Tensor, condition: Condition, w: Tensor) -> Tensor:
        return gaussian_v(z, t, {"label": torch.full((len(z),), 2)}, w)

    one = GuidedTeacher(gaussian_v, gaussian_v, NULL)
    two = GuidedTeacher(gaussian_v, unconditional, {})
    matching = [
        losses.output_matching_loss(gaussian_v, t, SCHEDULE, batch(), (0.0, 4.0), draws(12)) for t in (one, two)
    ]
    halving = [losses.progressive_loss(gaussian_v, t, SCHEDULE, batch(), 4, (0.0, 4.0), draws(12)) for t in (one, two)]
    assert torch.allclose(matching[0], matching[1], rtol=0, atol=1e-6)
    assert torch.allclose(halving[0], halving[1], rtol=0, atol=1e-6)
    assert min(matching[0], halving[0]) > 1e-4
