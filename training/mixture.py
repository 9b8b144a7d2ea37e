"""Gaussian mixtures: data whose guided denoiser is known in closed form, and whose ODE can be solved to any accuracy.

What training makes of a teacher can be checked against them to the last digit. Knows no trained network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import solve_ivp
from torch import Generator, Tensor

from training.diffusion import Schedule, v_from
from training.guidance import Condition, guided


@dataclass(frozen=True)
class GaussianMixture:
    """K equally likely isotropic Gaussians in D dimensions, each belonging to a class.

    `means` (K, D), `deviations` (K,), `labels` (K,) the class of each. All in float64.
    """

    means: Tensor
    deviations: Tensor
    labels: Tensor

    @classmethod
    def on_a_circle(cls, dimensions: int, components: int = 8, classes: int = 4) -> GaussianMixture:
        """Means on a circle of radius sqrt(2) in the first two dimensions; neighbours share a class.

        Components differ in width, so that no class is a copy of another. Raises ValueError for less than two
        dimensions, and for more classes than components.
        """
        if dimensions < 2 or not 1 <= classes <= components:
            raise ValueError(f"{components} components of {classes} classes do not lie on a circle in {dimensions}-D")
        angles = 2 * math.pi * torch.arange(components, dtype=torch.float64) / components
        means = torch.zeros(components, dimensions, dtype=torch.float64)
        means[:, 0], means[:, 1] = math.sqrt(2) * angles.cos(), math.sqrt(2) * angles.sin()
        deviations = torch.linspace(0.2, 0.4, components, dtype=torch.float64)
        return cls(means, deviations, torch.arange(components) * classes // components)

    @property
    def classes(self) -> int:
        """The number of classes; this number itself is the null class, which stands for all of them."""
        return int(self.labels.max()) + 1

    def draw(self, rows: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Data (rows, D) and the class (rows,) of each."""
        k = torch.randint(len(self.labels), (rows,), generator=generator)
        noise = torch.randn(rows, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[k] + self.deviations[k, None] * noise, self.labels[k]

    def v(self, z: Tensor, alpha: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        """The exact E[v | z_t, class] (B, D) of z (B, D) in float64, at alpha and sigma of shape (B, 1).

        Given z_t and component k, x is Gaussian about mu_k + alpha s_k^2 / var_k (z - alpha mu_k), where
        var_k = alpha^2 s_k^2 + sigma^2; components are weighed by how likely they made z_t.
        """
        offset = z[:, None] - alpha[..., None] * self.means  # (B, K, D)
        variance = (alpha * self.deviations).square() + sigma.square()  # (B, K)
        belongs = (self.labels == label[:, None]) | (label == self.classes)[:, None]
        log_likelihood = -0.5 * (offset.square().sum(-1) / variance + self.means.shape[1] * variance.log())
        weight = log_likelihood.masked_fill(~belongs, -math.inf).softmax(1)
        scaled = offset / variance[..., None]
        x = self.means + (alpha * self.deviations.square())[..., None] * scaled
        eps = sigma[..., None] * scaled
        return (weight[..., None] * v_from(x, eps, alpha[..., None], sigma[..., None])).sum(1)

    def guided_v(self, z: Tensor, alpha: Tensor, sigma: Tensor, label: Tensor, w: Tensor) -> Tensor:
        """The exact guided v, with w of shape (B,)."""
        null = torch.full_like(label, self.classes)
        return guided(self.v(z, alpha, sigma, label), self.v(z, alpha, sigma, null), w)


@dataclass(frozen=True)
class ExactDenoiser:
    """The exact conditional denoiser of a mixture as a Denoiser, for the condition `label` (B,); it heeds no w."""

    mixture: GaussianMixture
    schedule: Schedule

    def __call__(self, z: Tensor, t: Tensor, condition: Condition, w: Tensor) -> Tensor:
        """The exact v, computed in float64 and given in the type of `z`."""
        alpha, sigma = self.schedule.at(t, z.double())
        return self.mixture.v(z.double(), alpha, sigma, condition["label"]).to(z)


def solve_guided_ode(
    mixture: GaussianMixture, noise: Tensor, label: Tensor, w: Tensor, start: tuple[float, float], rtol: float = 1e-9
) -> Tensor:
    """Clean data (B, D) in float64 to which the guided probability-flow ODE carries noise (B, D).

    With alpha = cos phi and sigma = sin phi the ODE is dz/dphi = v (Salimans & Ho 2022, appendix D): it is solved
    from the phi of `start` = (alpha, sigma) down to 0, to the tolerance `rtol` of the root mean square over all rows.
    Raises RuntimeError if the solver gives up.
    """
    shape = tuple(noise.shape)

    def slope(phi: float, z: NDArray[np.float64]) -> NDArray[np.float64]:
        alpha, sigma = (torch.full((shape[0], 1), f(phi), dtype=torch.float64) for f in (math.cos, math.sin))
        v = mixture.guided_v(torch.from_numpy(z).reshape(shape), alpha, sigma, label, w.double())
        return v.flatten().numpy()

    phi = math.atan2(start[1], start[0])
    solution = solve_ivp(slope, (phi, 0.0), noise.double().flatten().numpy(), "DOP853", rtol=rtol, atol=rtol)
    if not solution.success:
        raise RuntimeError(f"the ODE was not solved: {solution.message}")
    return torch.from_numpy(solution.y[:, -1].copy()).reshape(shape)
