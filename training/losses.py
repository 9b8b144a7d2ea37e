"""The three losses: teacher, output matching (stage 1), progressive distillation (stage 2). They own no loop.

Noise, times and weights w come from the draws given, so that a step can be repeated exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from training.diffusion import Schedule, ddim_step, diffuse, expand, implied_v, v_from
from training.draws import Draws
from training.guidance import Condition, Denoiser
from training.sections import Weighting

MOST_SNR = 30.0
WEIGHTINGS: Mapping[Weighting, Callable[[Tensor, Tensor], Tensor]] = {
    "truncated-snr": lambda alpha, sigma: torch.maximum(alpha.square(), sigma.square()),
    "clamped-snr": lambda alpha, sigma: alpha.square().clamp(sigma.square(), MOST_SNR * sigma.square()),
    "snr-plus-one": lambda alpha, sigma: torch.ones_like(alpha),
    "uniform": lambda alpha, sigma: sigma.square(),
}
"""What ||v - target||^2 is multiplied with for the weight omega of ||x - target||^2 to be max(SNR, 1), that and at most
`MOST_SNR` (after Hang et al. 2023, section 3.4), SNR + 1 or 1.

At fixed z_t, x moves by sigma and eps by alpha times what v moves by, and SNR = alpha^2 / sigma^2.
"""


@dataclass(frozen=True)
class Batch:
    """Clean data x (B, *) and its condition, each array (B, *)."""

    x: Tensor
    condition: Condition


def draw_times(steps: int, draws: Draws) -> Tensor:
    """Times t = i / steps, i uniform in 1..steps, of shape (B,) in float64."""
    return (draws.integers(steps) + 1).double() / steps


def draw_any_times(schedule: Schedule, draws: Draws) -> Tensor:
    """Times at which a network of the schedule can be asked: any in (0, 1], or the multiples of 1 / T."""
    return 1 - draws.uniform() if schedule.continuous else draw_times(schedule.timesteps, draws)


def draw_guidance(w_range: tuple[float, float], draws: Draws) -> Tensor:
    """Draw w ~ U[w_min, w_max] of shape (B,) in float64 (Meng et al. 2023, section 3.1)."""
    low, high = w_range
    return low + (high - low) * draws.uniform()


def drop_condition(condition: Condition, null: Condition, share: float, draws: Draws) -> Condition:
    """Replace the condition of a random share of the rows by the null condition (Ho & Salimans 2022)."""
    dropped = draws.uniform() < share

    def replaced(kept: Tensor, value: Tensor) -> Tensor:
        return torch.where(expand(dropped.to(kept.device), kept), value.to(kept), kept)

    return {**condition, **{name: replaced(condition[name], value) for name, value in null.items()}}


def weighted_loss(v: Tensor, target: Tensor, alpha: Tensor, sigma: Tensor, weighting: Weighting) -> Tensor:
    """omega(SNR) ||x - target's x||^2, a scalar, of v and its target at the same z_t, for all t in [0, 1].

    With truncated SNR (Salimans & Ho 2022, section 4) it is in the form of the reference code: per example the larger
    of the mean squared errors of x and of eps.
    """
    squared = (v - target).square().flatten(1).mean(1)
    return (WEIGHTINGS[weighting](alpha, sigma).flatten() * squared).mean()


def teacher_loss(
    denoiser: Denoiser,
    schedule: Schedule,
    batch: Batch,
    null: Condition,
    drop: float,
    draws: Draws,
    weighting: Weighting = "snr-plus-one",
) -> Tensor:
    """omega(SNR) ||x_theta(z_t, t, c) - x||^2 at t uniform over the schedule, the condition dropped at times.

    With omega = SNR + 1 that is ||v_theta - v||^2.
    """
    t = draw_any_times(schedule, draws).to(batch.x)
    alpha, sigma = schedule.at(t, batch.x)
    eps = draws.normal(batch.x)
    condition = drop_condition(batch.condition, null, drop, draws)
    z = diffuse(batch.x, eps, alpha, sigma)
    v = denoiser(z, t, condition, torch.zeros_like(t))
    return weighted_loss(v, v_from(batch.x, eps, alpha, sigma), alpha, sigma, weighting)


def output_matching_loss(
    student: Denoiser,
    teacher: Denoiser,
    schedule: Schedule,
    batch: Batch,
    w_range: tuple[float, float],
    draws: Draws,
    weighting: Weighting = "truncated-snr",
) -> Tensor:
    """Stage 1: the student with input w matches the guided teacher (Meng et al. 2023, section 3.1)."""
    t = draw_any_times(schedule, draws).to(batch.x)
    w = draw_guidance(w_range, draws).to(batch.x)
    alpha, sigma = schedule.at(t, batch.x)
    z = diffuse(batch.x, draws.normal(batch.x), alpha, sigma)
    with torch.no_grad():
        target = teacher(z, t, batch.condition, w)
    return weighted_loss(student(z, t, batch.condition, w), target, alpha, sigma, weighting)


def target_along(
    teacher: Denoiser, schedule: Schedule, z: Tensor, times: Sequence[Tensor], condition: Condition, w: Tensor
) -> Tensor:
    """The v that carries z from the first time to the last as DDIM steps of the teacher from each to the next do.

    Meng et al. 2023, algorithm 2, whose steps are two; for times (B,) either way. Where the last is 0 its x is that of
    the teacher's last step. A step from a time to the same goes nowhere.
    """
    levels = [schedule.at(t, z) for t in times]
    z_next = z
    for t, now, following in zip(times[:-1], levels[:-1], levels[1:], strict=True):
        z_next = ddim_step(z_next, teacher(z_next, t, condition, w), *now, *following)
    return implied_v(z, z_next, *levels[0], *levels[-1])


Course = Literal["deterministic", "stochastic", "encoding"]
"""What a student of stage 2 is for: the deterministic sampler, the stochastic one, or encoding."""


def draw_steps(course: Course, steps: int, draws: Draws, replaced: int = 2) -> list[Tensor]:
    """Where steps of a student of N = `steps` steps begin, where its teacher's steps between do, and where they end.

    Times (B,) in float64, one more than the steps of the teacher that one of the student's replaces, all on the
    teacher's grid. Deterministic: from i/N to (i - 1)/N. Encoding: the other way. Stochastic: from i/2N, as long as a
    deterministic step, for the sampler of 2N calls that goes two of its own steps forth and one back; the last one,
    from 1/2N, is half as long, which is one step of the teacher (Meng et al. 2023, section 3.3).
    """
    if course == "stochastic":
        return stochastic_step(draw_times(2 * steps, draws), steps)
    t = draw_times(steps, draws)
    times = [t, *(t - k / (replaced * steps) for k in range(1, replaced)), ((t * steps).round() - 1) / steps]
    return times[::-1] if course == "encoding" else times


def stochastic_step(t: Tensor, steps: int) -> list[Tensor]:
    """Where the step of a stochastic student of N = `steps` steps from t (B,) begins, where between, where it ends."""
    t_next = (t - 1 / steps).clamp(min=0)
    return [t, t_next + 0.5 / steps, t_next]


def progressive_loss(
    student: Denoiser,
    teacher: Denoiser,
    schedule: Schedule,
    batch: Batch,
    steps: int,
    w_range: tuple[float, float],
    draws: Draws,
    weighting: Weighting = "truncated-snr",
    course: Course = "deterministic",
    replaced: int = 2,
) -> Tensor:
    """Stage 2: one step of the N-step student matches the DDIM steps of its teacher that it replaces, at the same w."""
    times = [t.to(batch.x) for t in draw_steps(course, steps, draws, replaced)]
    w = draw_guidance(w_range, draws).to(batch.x)
    alpha, sigma = schedule.at(times[0], batch.x)
    z = diffuse(batch.x, draws.normal(batch.x), alpha, sigma)
    with torch.no_grad():
        target = target_along(teacher, schedule, z, times, batch.condition, w)
    return weighted_loss(student(z, times[0], batch.condition, w), target, alpha, sigma, weighting)
