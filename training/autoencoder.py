"""The autoencoder that makes the latent space: its training, the measure of its scale, and what another run trained."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from training.draws import Draws
from training.errors import TrainingError
from training.recipe import Recipe
from training.sections import AutoencoderRecipe, halved
from training.store import hash_of_files, whole_file

AUTOENCODER_WEIGHTS = "diffusion_pytorch_model.safetensors"
SCALE_ROWS = 64
FILES = ("config.json", AUTOENCODER_WEIGHTS)  # the one that makes it whole is the last


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
def measure_scale(autoencoder: AutoencoderKL, images: Tensor, device: torch.device) -> float:
    """1 / the standard deviation of the latents of `images` (N, 3, H, W): latents times it have unit variance."""
    parts = [
        autoencoder.encode(part.to(device), return_dict=False)[0].mode().cpu() for part in images.split(SCALE_ROWS)
    ]
    return float(1.0 / torch.cat(parts).std())


def take_autoencoder(source: Path, target: Path) -> None:
    """Copy an autoencoder that another run trained into this run's folder, unless it is there: the other's may go.

    Raises TrainingError where there is none, or where this run has another.
    """
    theirs, ours = ([folder / name for name in FILES] for folder in (source, target))
    found = all(file.is_file() for file in theirs)
    if not ours[-1].exists():
        if not found:
            raise TrainingError(f"{source} holds no trained autoencoder")
        for file, copy in zip(theirs, ours, strict=True):
            with whole_file(copy) as partial:
                shutil.copyfile(file, partial)
    if found and hash_of_files(theirs) != hash_of_files(ours):
        raise TrainingError(f"{target.parent} was begun with another autoencoder than that in {source}")


def latent_shape(autoencoder: AutoencoderKL, recipe: Recipe) -> tuple[int, int, int]:
    """The shape (c, h, w) of a latent of the recipe's images. Raises TrainingError for a side that does not fit."""
    try:
        side = halved("autoencoder", recipe.data.size, len(autoencoder.config["block_out_channels"]) - 1)
        if recipe.network is not None:
            recipe.network.check_side(side)
    except ValueError as error:
        raise TrainingError(f"{recipe.data.autoencoder}: {error}") from error
    return autoencoder.config["latent_channels"], side, side
