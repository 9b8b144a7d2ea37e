"""Training of the autoencoder that makes the latent space, and the measure of its scale."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Generator, Tensor

from training.losses import draw_normal
from training.recipe import AutoencoderRecipe


def reconstruction_loss(
    autoencoder: AutoencoderKL, images: Tensor, recipe: AutoencoderRecipe, generator: Generator
) -> Tensor:
    """L1 + L1 of the differences between neighbours (edges matter in drawings) + a small KL term."""
    posterior = autoencoder.encode(images, return_dict=False)[0]
    latents = posterior.mean + posterior.std * draw_normal(posterior.mean, generator)
    output = autoencoder.decode(latents, return_dict=False)[0]
    loss: Tensor = (output - images).abs().mean() + recipe.kl_weight * posterior.kl().mean()
    for axis in (-1, -2):
        loss = loss + recipe.gradient_weight * (output.diff(dim=axis) - images.diff(dim=axis)).abs().mean()
    return loss


@torch.inference_mode()
def measure_scale(autoencoder: AutoencoderKL, images: Tensor, device: torch.device, rows: int = 64) -> float:
    """1 / the standard deviation of the latents of `images` (N, 3, H, W): latents times it have unit variance."""
    parts = [autoencoder.encode(part.to(device), return_dict=False)[0].mode().cpu() for part in images.split(rows)]
    return float(1.0 / torch.cat(parts).std())
