"""The networks: a diffusers UNet behind the Denoiser protocol, an autoencoder, and how a student is born."""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from training.guidance import Condition
from training.recipe import AutoencoderRecipe, NetworkRecipe

GUIDANCE_EMBEDDING_DIM = 256
POOLING_HEADS = 8


def guidance_embedding(w: Tensor, dim: int = GUIDANCE_EMBEDDING_DIM) -> Tensor:
    """Fourier features of w, shape (B, dim): diffusers' get_guidance_scale_embedding, traceable.

    Frequencies exp(-ln(10000) k / (dim/2 - 1)) of 1000 w, sines then cosines.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=w.device) / (half - 1)
    angles = 1000.0 * w.float()[:, None] * torch.pow(10000.0, -exponents)[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class UNetDenoiser(nn.Module):
    """A UNet2DConditionModel as a Denoiser: v from (z, t, condition), and w where the network takes it.

    The condition is `context` (B, L, D) for text or `label` (B,) for classes.
    """

    def __init__(self, unet: UNet2DConditionModel, timesteps: int) -> None:
        """`timesteps` is the T of the schedule: the network counts timesteps 0..T - 1."""
        super().__init__()
        self.unet, self.timesteps = unet, timesteps
        self.takes_guidance = unet.config["time_cond_proj_dim"] is not None

    def forward(self, z: Tensor, t: Tensor, condition: Condition, w: Tensor) -> Tensor:
        """Predict v with shape (B, c, h, w) at times t (B,) in (0, 1]."""
        prediction: Tensor = self.unet(
            z,
            t * self.timesteps - 1,
            encoder_hidden_states=condition.get("context"),
            class_labels=condition.get("label"),
            timestep_cond=guidance_embedding(w).to(z) if self.takes_guidance else None,
            return_dict=False,
        )[0]
        return prediction


def build_unet(
    recipe: NetworkRecipe, latent_shape: tuple[int, int, int], context_dim: int | None, classes: int
) -> UNet2DConditionModel:
    """An untrained teacher network for latents (c, h, w), conditioned on text or on `classes` and a null class.

    Time, and the class or the text as a whole (pooled by attention), scale and shift every block; the levels attend
    to the tokens as well.
    """
    channels, height, _ = latent_shape
    levels = len(recipe.channels)
    attention = "CrossAttn" if context_dim else ""
    return UNet2DConditionModel(
        sample_size=height,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(recipe.channels),
        layers_per_block=recipe.layers_per_block,
        down_block_types=(f"{attention}DownBlock2D",) * levels,
        up_block_types=(f"{attention}UpBlock2D",) * levels,
        mid_block_type="UNetMidBlock2DCrossAttn" if context_dim else "UNetMidBlock2D",
        cross_attention_dim=context_dim or recipe.channels[-1],
        attention_head_dim=recipe.attention_heads,
        norm_num_groups=recipe.norm_groups,
        num_class_embeds=classes + 1 if classes else None,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text" if context_dim else None,
        addition_embed_type_num_heads=gcd(context_dim or POOLING_HEADS, POOLING_HEADS),
    )


def student_from(teacher: UNet2DConditionModel) -> UNet2DConditionModel:
    """A student with the teacher's weights and a w-embedding whose projection is zero.

    So the untrained student equals the conditional teacher at every w. A student is copied as it is.
    """
    config: dict[str, Any] = {key: value for key, value in teacher.config.items() if not key.startswith("_")}
    student = UNet2DConditionModel(**{**config, "time_cond_proj_dim": GUIDANCE_EMBEDDING_DIM})
    weights = dict(teacher.state_dict())
    projection = "time_embedding.cond_proj.weight"
    weights.setdefault(projection, torch.zeros_like(student.state_dict()[projection]))
    student.load_state_dict(weights)
    return student


def build_autoencoder(recipe: AutoencoderRecipe, size: int) -> AutoencoderKL:
    """An untrained AutoencoderKL that divides the image's side by 2 ** (levels - 1)."""
    levels = len(recipe.channels)
    return AutoencoderKL(
        sample_size=size,
        latent_channels=recipe.latent_channels,
        block_out_channels=tuple(recipe.channels),
        layers_per_block=recipe.layers_per_block,
        norm_num_groups=recipe.norm_groups,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
    )


def encode(autoencoder: AutoencoderKL, images: Tensor) -> Tensor:
    """Scaled latents (B, c, h, w), the mean of the posterior, of images (B, 3, H, W) in [-1, 1]."""
    latents: Tensor = autoencoder.encode(images, return_dict=False)[0].mode() * autoencoder.config["scaling_factor"]
    return latents


def decode(autoencoder: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images (B, 3, H, W) of scaled latents (B, c, h, w)."""
    images: Tensor = autoencoder.decode(latents / autoencoder.config["scaling_factor"], return_dict=False)[0]
    return images
