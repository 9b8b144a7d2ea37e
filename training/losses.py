"""The three losses: teacher, output matching (stage 1), progressive distillation (stage 2). They own no loop.

Noise, times and weights w are drawn from the generator given, so that a step can be repeated exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from training.diffusion import Schedule, ddim_step, diffuse, expand, implied_x, v_from, x_from_v
from training.guidance import Condition, Denoiser


@dataclass(frozen=True)
class Batch:
    """Clean data x (B, *) and its condition, each array (B, *)."""

    x: Tensor
    condition: Condition


Loss = Callable[[Batch, Generator], Tensor]


def draw_normal(like: Tensor, generator: Generator) -> Tensor:
    """Standard normal noise of the shape of `like`, drawn on the generator's device."""
    return torch.randn(like.shape, generator=generator, device=generator.device).to(like)


def draw_times(like: Tensor, steps: int, generator: Generator) -> Tensor:
    """Times t = i / steps, i uniform in 1..steps, of shape (B,)."""
    i = torch.randint(1, steps + 1, (len(like),), generator=generator, device=generator.device)
    return (i / steps).to(like)


def draw_guidance(like: Tensor, w_range: tuple[float, float], generator: Generator) -> Tensor:
    """Draw w ~ U[w_min, w_max] of shape (B,) (Meng et al. 2023, equation 2)."""
    low, high = w_range
    return (low + (high - low) * torch.rand(len(like), generator=generator, device=generator.device)).to(like)


def drop_condition(condition: Condition, null: Condition, share: float, generator: Generator) -> Condition:
    """Replace the condition of a random share of the rows by the null condition (Ho & Salimans 2022)."""
    rows = len(next(iter(condition.values())))
    dropped = torch.rand(rows, generator=generator, device=generator.device) < share
    return {
        name: torch.where(expand(dropped.to(value.device), value), null[name].to(value), value)
        for name, value in condition.items()
    }


def truncated_snr_loss(x: Tensor, target: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """max(SNR, 1) ||x - target||^2 (Salimans & Ho 2022, section 4), a scalar.

    In the form of the reference code: per example the larger of the mean squared errors of x and of eps; at
    fixed z_t the latter is alpha^2 / sigma^2 times the former.
    """
    squared = (x - target).square().flatten(1).mean(1)
    snr = (alpha / sigma).square().flatten()
    return (snr.clamp(min=1.0) * squared).mean()


def teacher_loss(
    denoiser: Denoiser, schedule: Schedule, batch: Batch, null: Condition, drop: float, generator: Generator
) -> Tensor:
    """||v_theta(z_t, t, c) - v||^2 at t uniform on the schedule's timesteps, the condition dropped at times."""
    t = draw_times(batch.x, schedule.timesteps, generator)
    alpha, sigma = schedule.at(t, batch.x)
    eps = draw_normal(batch.x, generator)
    condition = drop_condition(batch.condition, null, drop, generator)
    z = diffuse(batch.x, eps, alpha, sigma)
    v = denoiser(z, t, condition, torch.zeros_like(t))
    return (v - v_from(batch.x, eps, alpha, sigma)).square().mean()


def output_matching_loss(
    student: Denoiser,
    teacher: Denoiser,
    schedule: Schedule,
    batch: Batch,
    w_range: tuple[float, float],
    generator: Generator,
) -> Tensor:
    """Stage 1: the student with input w matches the guided teacher's x (Meng et al. 2023, equation 2)."""
    t = draw_times(batch.x, schedule.timesteps, generator)
    w = draw_guidance(batch.x, w_range, generator)
    alpha, sigma = schedule.at(t, batch.x)
    z = diffuse(batch.x, draw_normal(batch.x, generator), alpha, sigma)
    with torch.no_grad():
        target = x_from_v(z, teacher(z, t, batch.condition, w), alpha, sigma)
    x = x_from_v(z, student(z, t, batch.condition, w), alpha, sigma)
    return truncated_snr_loss(x, target, alpha, sigma)


def two_step_target(
    teacher: Denoiser, schedule: Schedule, z: Tensor, t: Tensor, steps: int, condition: Condition, w: Tensor
) -> Tensor:
    """The x that carries z_t to t'' = t - 1/N as two DDIM steps of the teacher do, by way of t' = t - 1/2N.

    Meng et al. 2023, algorithm 2. For t'' = 0 it is the teacher's own x, at t'.
    """
    t_half, t_next = t - 0.5 / steps, t - 1.0 / steps
    now, half, following = schedule.at(t, z), schedule.at(t_half, z), schedule.at(t_next, z)
    z_half = ddim_step(z, teacher(z, t, condition, w), *now, *half)
    z_next = ddim_step(z_half, teacher(z_half, t_half, condition, w), *half, *following)
    return implied_x(z, z_next, *now, *following)


def progressive_loss(
    student: Denoiser,
    teacher: Denoiser,
    schedule: Schedule,
    batch: Batch,
    steps: int,
    w_range: tuple[float, float],
    generator: Generator,
) -> Tensor:
    """Stage 2: one step of the N-step student matches two DDIM steps of its teacher at the same w."""
    t = draw_times(batch.x, steps, generator)
    w = draw_guidance(batch.x, w_range, generator)
    alpha, sigma = schedule.at(t, batch.x)
    z = diffuse(batch.x, draw_normal(batch.x, generator), alpha, sigma)
    with torch.no_grad():
        target = two_step_target(teacher, schedule, z, t, steps, batch.condition, w)
    x = x_from_v(z, student(z, t, batch.condition, w), alpha, sigma)
    return truncated_snr_loss(x, target, alpha, sigma)
