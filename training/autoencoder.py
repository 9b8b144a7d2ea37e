"""Training of the autoencoder that makes the latent space, and the measure of its scale."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from training.draws import Draws
from training.recipe import AutoencoderRecipe


class Reconstructor(nn.Module):
    """An autoencoder whose forward pass is what its training needs."""

    def __init__(self, autoencoder: AutoencoderKL) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, images: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) made anew from a random latent of each, and the KL divergence (B,) of the latents."""
        posterior = self.autoencoder.encode(images, return_dict=False)[0]
        latents = posterior.mean + posterior.std * draws.normal(posterior.mean)
        return self.autoencoder.decode(latents, return_dict=False)[0], posterior.kl()


def reconstruction_loss(network: nn.Module, images: Tensor, recipe: AutoencoderRecipe, draws: Draws) -> Tensor:
    """Of a Reconstructor: L1 + L1 of differences of neighbours (edges matter in drawings) + a small KL term."""
    output, kl = network(images, draws)
    loss: Tensor = (output - images).abs().mean() + recipe.kl_weight * kl.mean()
    for axis in (-1, -2):
        loss = loss + recipe.gradient_weight * (output.diff(dim=axis) - images.diff(dim=axis)).abs().mean()
    return loss


@torch.inference_mode()
def measure_scale(autoencoder: AutoencoderKL, images: Tensor, device: torch.device, rows: int = 64) -> float:
    """1 / the standard deviation of the latents of `images` (N, 3, H, W): latents times it have unit variance."""
    parts = [autoencoder.encode(part.to(device), return_dict=False)[0].mode().cpu() for part in images.split(rows)]
    return float(1.0 / torch.cat(parts).std())
