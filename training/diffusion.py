"""The mathematics of diffusion: one formula, one function. Knows tensors; knows no network.

Notation of Meng et al. (2023) and Salimans & Ho (2022): z_t = alpha_t x + sigma_t eps, t = 0 clean, t = 1 noise.
`alpha` and `sigma` are tensors that broadcast against `z`; `expand` makes per-row values do so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler
from torch import Tensor


def expand(per_row: Tensor, like: Tensor) -> Tensor:
    """Reshape per-row values (B,) to (B, 1, ..., 1) so that they broadcast against `like` (B, *)."""
    return per_row.reshape(-1, *[1] * (like.ndim - 1))


def diffuse(x: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """z_t = alpha_t x + sigma_t eps."""
    return alpha * x + sigma * eps


def v_from(x: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """v = alpha_t eps - sigma_t x (Salimans & Ho 2022, appendix D)."""
    return alpha * eps - sigma * x


def x_from_v(z: Tensor, v: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x = alpha_t z_t - sigma_t v; defined at every t, alpha_t = 0 included."""
    return alpha * z - sigma * v


def eps_from_v(z: Tensor, v: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """eps = sigma_t z_t + alpha_t v."""
    return sigma * z + alpha * v


def ddim_step(z: Tensor, v: Tensor, alpha: Tensor, sigma: Tensor, alpha_next: Tensor, sigma_next: Tensor) -> Tensor:
    """The deterministic step z_t -> z_s = alpha_s x + sigma_s eps (Song et al. 2021, eta = 0) of a prediction v."""
    return diffuse(x_from_v(z, v, alpha, sigma), eps_from_v(z, v, alpha, sigma), alpha_next, sigma_next)


def implied_x(
    z: Tensor, z_next: Tensor, alpha: Tensor, sigma: Tensor, alpha_next: Tensor, sigma_next: Tensor
) -> Tensor:
    """The x for which one DDIM step leads from z_t to z_t'' (Salimans & Ho 2022, equation 8).

    x = (z'' - (sigma''/sigma) z) / (alpha'' - (sigma''/sigma) alpha). At t'' = 0 it is z'' itself.
    """
    ratio = sigma_next / sigma
    return (z_next - ratio * z) / (alpha_next - ratio * alpha)


def blend_known(z: Tensor, known: Tensor, keep: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Put the known region back, noised to the time of `z`: keep (alpha known + sigma noise) + (1 - keep) z."""
    return keep * diffuse(known, noise, alpha, sigma) + (1 - keep) * z


@dataclass(frozen=True)
class Grid:
    """The N + 1 times of an N-step sampler, from noise to clean, and alpha and sigma there: each (N + 1,)."""

    times: Tensor
    alphas: Tensor
    sigmas: Tensor

    @property
    def steps(self) -> int:
        """N, the number of steps."""
        return len(self.times) - 1


@dataclass(frozen=True)
class Schedule:
    """A variance-preserving schedule on T timesteps: `alphas` and `sigmas` of shape (T + 1,), index 0 clean.

    The time t of index i is i / T; a network that counts timesteps from 0 is fed i - 1, as diffusers does.
    """

    alphas: Tensor
    sigmas: Tensor

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor) -> Schedule:
        """From diffusers' alphas_cumprod of shape (T,), its alpha squared."""
        squared = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod.double().cpu()])
        return cls(squared.sqrt().float(), (1 - squared).sqrt().float())

    @classmethod
    def cosine(cls, timesteps: int = 1024) -> Schedule:
        """The cosine schedule (Nichol & Dhariwal 2021) as diffusers' squaredcos_cap_v2 has it."""
        return cls.from_alphas_cumprod(cosine_scheduler(timesteps).alphas_cumprod)

    @property
    def timesteps(self) -> int:
        """T."""
        return len(self.alphas) - 1

    def index(self, t: Tensor) -> Tensor:
        """The index i of times t = i / T, the nearest one."""
        return (t * self.timesteps).round().long()

    def at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Alpha and sigma at per-row times t (B,), shaped to broadcast against `like` (B, *)."""
        i = self.index(t).cpu()
        return expand(self.alphas[i].to(like), like), expand(self.sigmas[i].to(like), like)

    def grid(self, steps: int) -> Grid:
        """The grid t_k = 1 - k / N. Raises ValueError unless N divides T, so that halvings share their times."""
        if steps < 1 or self.timesteps % steps:
            raise ValueError(f"{steps} steps do not divide the {self.timesteps} timesteps of the schedule")
        return self.spaced(steps)

    def spaced(self, steps: int) -> Grid:
        """The grid t_k = 1 - k / N, each rounded to the nearest timestep: for baselines, whose N need not divide T.

        Raises ValueError if N is not in 1..T.
        """
        if not 1 <= steps <= self.timesteps:
            raise ValueError(f"{steps} steps cannot be taken on {self.timesteps} timesteps")
        i = self.index(1 - torch.arange(steps + 1, dtype=torch.float64) / steps)
        return Grid(i / self.timesteps, self.alphas[i], self.sigmas[i])


def cosine_scheduler(timesteps: int = 1024) -> DDIMScheduler:
    """The stock scheduler whose steps our grids repeat: trailing spacing, v-prediction, no clipping."""
    return DDIMScheduler(
        num_train_timesteps=timesteps,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )
