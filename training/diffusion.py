"""The mathematics of diffusion: one formula, one function. Knows tensors; knows no network.

Notation of Meng et al. (2023) and Salimans & Ho (2022): z_t = alpha_t x + sigma_t eps, t = 0 clean, t = 1 noise, and
alpha_t^2 + sigma_t^2 = 1. `alpha` and `sigma` are tensors that broadcast against `z`; `expand` makes per-row values
do so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from training.sections import OwnPrediction


def expand(per_row: Tensor, like: Tensor) -> Tensor:
    """Reshape per-row values (B,) to (B, 1, ..., 1) so that they broadcast against `like` (B, *)."""
    return per_row.reshape(-1, *[1] * (like.ndim - 1))


def diffuse(x: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """z_t = alpha_t x + sigma_t eps."""
    return alpha * x + sigma * eps


def renoise(z: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, alpha_later: Tensor, sigma_later: Tensor) -> Tensor:
    """A sample of q(z_t | z_s) for t later than s: (alpha_t/alpha_s) z_s plus noise (Salimans & Ho 2022, section 2)."""
    ratio = alpha_later / alpha
    return ratio * z + (sigma_later.square() - (ratio * sigma).square()).clamp(min=0).sqrt() * noise


def v_from(x: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """v = alpha_t eps - sigma_t x (Salimans & Ho 2022, appendix D)."""
    return alpha * eps - sigma * x


def v_from_eps(z: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """v = (eps - sigma_t z_t) / alpha_t; not defined where alpha_t = 0."""
    return (eps - sigma * z) / alpha


def v_from_x(z: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """v = (alpha_t z_t - x) / sigma_t; not defined where sigma_t = 0."""
    return (alpha * z - x) / sigma


def v_from_flow(z: Tensor, u: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """v = (u + (alpha_t - sigma_t) z_t) / (alpha_t + sigma_t) of a rectified flow's u = eps - x (Liu et al. 2023).

    The flow's own state (1 - s) x + s eps is z_t / (alpha_t + sigma_t), at s = sigma_t / (alpha_t + sigma_t).
    """
    return (u + (alpha - sigma) * z) / (alpha + sigma)


def x_from_v(z: Tensor, v: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x = alpha_t z_t - sigma_t v; defined at every t, alpha_t = 0 included."""
    return alpha * z - sigma * v


def eps_from_v(z: Tensor, v: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """eps = sigma_t z_t + alpha_t v."""
    return sigma * z + alpha * v


def ddim_step(z: Tensor, v: Tensor, alpha: Tensor, sigma: Tensor, alpha_next: Tensor, sigma_next: Tensor) -> Tensor:
    """The deterministic step z_t -> z_s = alpha_s x + sigma_s eps (Song et al. 2021, eta = 0) of a prediction v.

    To an earlier time it denoises; to a later one it encodes.
    """
    return diffuse(x_from_v(z, v, alpha, sigma), eps_from_v(z, v, alpha, sigma), alpha_next, sigma_next)


def implied_v(
    z: Tensor, z_next: Tensor, alpha: Tensor, sigma: Tensor, alpha_next: Tensor, sigma_next: Tensor
) -> Tensor:
    """The v for which one DDIM step leads from z_t to z_s, earlier or later.

    v = ((alpha alpha' + sigma sigma') z - z') / (sigma alpha' - alpha sigma'). Its x is that of Salimans & Ho 2022,
    equation 8; in this form it is defined at s = 0 and at t = 0 too.
    """
    cosine = alpha * alpha_next + sigma * sigma_next
    sine = sigma * alpha_next - alpha * sigma_next
    return (cosine * z - z_next) / sine


def blend_known(z: Tensor, known: Tensor, keep: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Put the known region back, noised to the time of `z`: keep (alpha known + sigma noise) + (1 - keep) z."""
    return keep * diffuse(known, noise, alpha, sigma) + (1 - keep) * z


Prediction = Literal["v", "eps", "x", "flow"]
TO_V: Mapping[Prediction, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "v": lambda z, v, alpha, sigma: v,
    "eps": v_from_eps,
    "x": v_from_x,
    "flow": v_from_flow,
}
"""How the v of (z, output, alpha, sigma) is had from what a network predicts."""


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
    """A variance-preserving schedule: alpha_t = cos phi(t), sigma_t = sin phi(t), with phi(0) = 0.

    `angles` (T + 1,) in float64 has phi at t = i / T; between these, phi is linear. Every schedule is brought to this
    form, those that do not preserve variance by scaling z. Networks of a `continuous` one are trained at any t, those
    of another at t = i / T only.
    """

    angles: Tensor
    continuous: bool = False

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor) -> Schedule:
        """From diffusers' alphas_cumprod (T,), its alpha squared. Raises ValueError unless it falls from 1 to 0."""
        squared = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod.double().cpu()])
        if not (squared.isfinite().all() and (squared.diff() < 0).all() and squared[-1] >= 0):
            raise ValueError("alphas_cumprod must fall from below 1 to at least 0")
        return cls(torch.atan2((1 - squared).sqrt(), squared.sqrt()))

    @classmethod
    def cosine(cls, timesteps: int = 1024) -> Schedule:
        """The cosine schedule (Nichol & Dhariwal 2021) as diffusers' squaredcos_cap_v2 has it."""
        scheduler = DDIMScheduler(timesteps, beta_schedule="squaredcos_cap_v2")
        return cls.from_alphas_cumprod(scheduler.alphas_cumprod)

    @classmethod
    def continuous_cosine(cls, timesteps: int = 1024) -> Schedule:
        """alpha_t = cos(pi t / 2) at every t (Salimans & Ho 2022, section 2); `timesteps` is the network's scale."""
        return cls(torch.linspace(0, math.pi / 2, timesteps + 1, dtype=torch.float64), continuous=True)

    @classmethod
    def scaled_linear(cls, timesteps: int = 1000) -> Schedule:
        """Stable Diffusion's: the square roots of the betas rise linearly from 0.00085 to 0.012."""
        scheduler = DDIMScheduler(timesteps, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        return cls.from_alphas_cumprod(scheduler.alphas_cumprod)

    @classmethod
    def rectified_flow(cls, timesteps: int = 1000, shift: float = 1.0) -> Schedule:
        """z = (1 - s) x + s eps (Liu et al. 2023) scaled to preserve variance, s = shift t / (1 + (shift - 1) t).

        Raises ValueError unless `shift` and `timesteps` are positive.
        """
        if not 0 < shift < math.inf:
            raise ValueError(f"shift = {shift} is not positive")
        if timesteps < 1:
            raise ValueError(f"{timesteps} timesteps are not a schedule")
        t = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
        s = shift * t / (1 + (shift - 1) * t)
        return cls(torch.atan2(s, 1 - s), continuous=True)

    @property
    def timesteps(self) -> int:
        """T."""
        return len(self.angles) - 1

    @property
    def alphas(self) -> Tensor:
        """Alpha at t = i / T, (T + 1,), index 0 clean."""
        return self.angles.cos().float()

    @property
    def sigmas(self) -> Tensor:
        """Sigma at t = i / T, (T + 1,), index 0 clean."""
        return self.angles.sin().float()

    @property
    def betas(self) -> Tensor:
        """diffusers' betas (T,) in float64, 1 - alpha_i^2 / alpha_{i-1}^2."""
        squared = self.angles.cos().square()
        return 1 - squared[1:] / squared[:-1]

    def angle(self, t: Tensor) -> Tensor:
        """phi(t) in float64, of the shape of `t`, for t in [0, 1]."""
        angles, place = self.angles.to(t.device), t.double() * self.timesteps
        lower = place.floor().clamp(0, self.timesteps - 1).long()
        return torch.lerp(angles[lower], angles[lower + 1], place - lower)

    def last_time(self, alpha: float) -> float:
        """The last t = i / T whose alpha is at least so much."""
        return int((self.alphas >= alpha).sum() - 1) / self.timesteps

    def at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Alpha and sigma at per-row times t (B,), shaped to broadcast against `like` (B, *)."""
        phi = expand(self.angle(t), like)
        return phi.cos().to(like), phi.sin().to(like)

    def grid(self, steps: int) -> Grid:
        """The grid t_k = 1 - k / N. Raises ValueError unless N is positive."""
        if steps < 1:
            raise ValueError(f"{steps} steps are not a grid")
        times = 1 - torch.arange(steps + 1, dtype=torch.float64) / steps
        phi = self.angle(times)
        return Grid(times.float(), phi.cos().float(), phi.sin().float())


def stock_scheduler(schedule: Schedule, prediction: OwnPrediction = "v") -> DDIMScheduler:
    """The diffusers scheduler whose steps our grids repeat where N divides T: trailing, without clipping."""
    return DDIMScheduler(
        num_train_timesteps=schedule.timesteps,
        trained_betas=schedule.betas.tolist(),
        prediction_type={"v": "v_prediction", "x": "sample"}[prediction],
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=True,
    )
