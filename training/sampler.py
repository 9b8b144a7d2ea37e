"""The deterministic sampler: from noise along a grid to clean. Noise is an argument. Knows no files."""

from __future__ import annotations

import torch
from torch import Tensor

from training.diffusion import Grid, ddim_step
from training.guidance import Condition, Denoiser


@torch.inference_mode()
def sample(denoiser: Denoiser, grid: Grid, noise: Tensor, condition: Condition, w: Tensor) -> Tensor:
    """Clean data (B, *) from noise (B, *) in the steps of the grid, with guidance w of shape (B,).

    DDIM for a teacher, the student's own steps for a student: one network call a step, two for a guided teacher.
    """
    z = noise
    times, alphas, sigmas = (values.to(z) for values in (grid.times, grid.alphas, grid.sigmas))
    for k in range(grid.steps):
        v = denoiser(z, times[k].expand(len(z)), condition, w)
        z = ddim_step(z, v, alphas[k], sigmas[k], alphas[k + 1], sigmas[k + 1])
    return z
