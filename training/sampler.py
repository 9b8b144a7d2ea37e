"""The samplers: deterministic, stochastic, and encoding. Noise is an argument. They know no files.

A `denoiser` is a guided teacher, which calls its network twice a step, or a student, which calls it once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Generator, Tensor

from training.diffusion import Grid, blend_known, ddim_step, diffuse, renoise
from training.guidance import Condition, Denoiser


@dataclass(frozen=True)
class Kept:
    """What stays of an image while the rest is repainted: clean `known`, its `noise`, and `keep`, 1 where it stays.

    Shapes (B, c, h, w), and (B, 1, h, w) for `keep`.
    """

    known: Tensor
    keep: Tensor
    noise: Tensor


@torch.inference_mode()
def sample(
    denoiser: Denoiser,
    grid: Grid,
    z: Tensor,
    condition: Condition,
    w: Tensor,
    *,
    start: int = 0,
    kept: Kept | None = None,
) -> Tensor:
    """Clean data (B, *) from z (B, *) at place `start` of the grid, by DDIM steps with guidance w of shape (B,).

    At start 0, z is noise; an edit starts later, from `noised` data. What is kept is put back after every step.
    """
    times, alphas, sigmas = _on_device(grid, z)
    for k in range(start, grid.steps):
        v = denoiser(z, times[k].expand(len(z)), condition, w)
        z = ddim_step(z, v, alphas[k], sigmas[k], alphas[k + 1], sigmas[k + 1])
        if kept is not None:
            z = blend_known(z, kept.known, kept.keep, kept.noise, alphas[k + 1], sigmas[k + 1])
    return z


def noised(grid: Grid, x: Tensor, noise: Tensor, start: int) -> Tensor:
    """Clean data x (B, *) with noise (B, *), as at place `start` of the grid: where an edit begins (SDEdit)."""
    _, alphas, sigmas = _on_device(grid, x)
    return diffuse(x, noise, alphas[start], sigmas[start])


Fresh: TypeAlias = Callable[[Tensor], Tensor]
"""Gives noise of the shape of what it is given, other noise at each call."""


def fresh_from(generator: Generator) -> Fresh:
    """Noise drawn from a generator."""
    return lambda z: torch.randn(z.shape, generator=generator, device=generator.device).to(z)


@torch.inference_mode()
def sample_stochastic(
    denoiser: Denoiser,
    grid: Grid,
    z: Tensor,
    condition: Condition,
    w: Tensor,
    fresh: Fresh,
    *,
    start: int = 0,
    kept: Kept | None = None,
) -> Tensor:
    """Clean data (B, *) from z (B, *) at place `start` of the grid, as `sample`, but with noise added in between.

    Each step but the last goes two places on and adds noise to go one back (Meng et al. 2023, section 3.3): the
    student for it is that of N / 2 steps, trained as `stochastic`.
    """
    times, alphas, sigmas = _on_device(grid, z)
    for k in range(start, grid.steps):
        v = denoiser(z, times[k].expand(len(z)), condition, w)
        reached = min(k + 2, grid.steps)
        z = ddim_step(z, v, alphas[k], sigmas[k], alphas[reached], sigmas[reached])
        if kept is not None:
            z = blend_known(z, kept.known, kept.keep, kept.noise, alphas[reached], sigmas[reached])
        if k + 1 < grid.steps:
            z = renoise(z, fresh(z), alphas[reached], sigmas[reached], alphas[k + 1], sigmas[k + 1])
    return z


@torch.inference_mode()
def encode(denoiser: Denoiser, grid: Grid, x: Tensor, condition: Condition, w: Tensor) -> Tensor:
    """The noise (B, *) from which clean data x (B, *) come: the deterministic sampler in reverse time.

    (Meng et al. 2023, "Progressive distillation for encoding"; the student for it is trained as an encoder.)
    """
    times, alphas, sigmas = _on_device(grid, x)
    z = x
    for k in range(grid.steps, 0, -1):
        v = denoiser(z, times[k].expand(len(z)), condition, w)
        z = ddim_step(z, v, alphas[k], sigmas[k], alphas[k - 1], sigmas[k - 1])
    return z


@dataclass(frozen=True)
class Leg:
    """One way between data and noise: through which denoiser, on which grid, with which condition and w (B,)."""

    denoiser: Denoiser
    grid: Grid
    condition: Condition
    w: Tensor


def transfer(x: Tensor, there: Leg, back: Leg) -> Tensor:
    """Clean data x (B, *) in another style: encoded with one condition or model, decoded with another.

    (Dual implicit bridges, Su et al. 2023; Meng et al. 2023, "Progressive distillation for encoding".)
    """
    noise = encode(there.denoiser, there.grid, x, there.condition, there.w)
    return sample(back.denoiser, back.grid, noise, back.condition, back.w)


def _on_device(grid: Grid, like: Tensor) -> Iterator[Tensor]:
    return (values.to(like) for values in (grid.times, grid.alphas, grid.sigmas))
