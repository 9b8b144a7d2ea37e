"""The samplers of a candidate by name: our own DDIM steps, and diffusers' solvers of higher order as baselines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from training.diffusion import Schedule
from training.guidance import Condition, Denoiser
from training.sampler import sample

Solver = Literal["ddim", "dpm-solver++", "unipc"]
SOLVERS: tuple[Solver, ...] = get_args(Solver)
SOLVER_NAMES: Mapping[str, str] = {
    "ddim": "DDIM",
    "dpm-solver++": "DPM-Solver++ (2M)",
    "unipc": "UniPC",
    "stochastic": "stochastic",
}
# Up to here 1 - beta, which diffusers has in float32, keeps three digits; a cosine schedule stays below.
MAX_BETA = 0.9999


def sample_with(
    sampler: Solver,
    denoiser: Denoiser,
    schedule: Schedule,
    steps: int,
    noise: Tensor,
    condition: Condition,
    w: Tensor,
) -> Tensor:
    """Clean data (B, *) from noise (B, *) in so many steps, with guidance w of shape (B,).

    Every sampler calls the denoiser once a step. Raises ValueError if the schedule has fewer timesteps than `steps`.
    """
    if not 1 <= steps <= schedule.timesteps:
        raise ValueError(f"{steps} steps cannot be taken on {schedule.timesteps} timesteps")
    if sampler == "ddim":
        return sample(denoiser, schedule.grid(steps), noise, condition, w)
    return _sample_with_scheduler(scheduler_for(sampler, schedule), denoiser, steps, noise, condition, w)


def scheduler_for(
    sampler: Literal["dpm-solver++", "unipc"], schedule: Schedule
) -> DPMSolverMultistepScheduler | UniPCMultistepScheduler:
    """Diffusers' DPM-Solver++ 2M (Lu et al. 2022) or UniPC of second order (Zhao et al. 2023) on our schedule.

    Trailing timesteps, the last step to sigma = 0, no clipping and no thresholding. A last alpha of zero, whose
    logarithm the solvers need, becomes a very small one.
    """
    betas = schedule.betas.clamp(max=MAX_BETA).tolist()
    common = {
        "num_train_timesteps": schedule.timesteps,
        "trained_betas": betas,
        "solver_order": 2,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "final_sigmas_type": "zero",
        "lower_order_final": True,
        "thresholding": False,
    }
    if sampler == "dpm-solver++":
        scheduler = DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", **common)
    else:
        scheduler = UniPCMultistepScheduler(**common)
    # The schedulers hand them to numpy, which warns of the tensor.
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.numpy()
    return scheduler


@torch.inference_mode()
def _sample_with_scheduler(
    scheduler: DPMSolverMultistepScheduler | UniPCMultistepScheduler,
    denoiser: Denoiser,
    steps: int,
    noise: Tensor,
    condition: Condition,
    w: Tensor,
) -> Tensor:
    z = noise
    scheduler.set_timesteps(steps, device=z.device)
    if len(scheduler.timesteps) > steps:
        # For some step counts (49 of 1024) rounding gives diffusers' trailing spacing one too many, the timestep -1.
        scheduler.timesteps = scheduler.timesteps[:steps]
        scheduler.sigmas = torch.cat([scheduler.sigmas[:steps], scheduler.sigmas[-1:]])
    for timestep in scheduler.timesteps:
        # Timestep i - 1 of diffusers is our index i.
        t = ((timestep + 1) / scheduler.config.num_train_timesteps).to(z).expand(len(z))
        z = scheduler.step(denoiser(z, t, condition, w), timestep, z, return_dict=False)[0]
    return z
