"""Networks of diffusers behind the Denoiser protocol, how a student is born of one, and an autoencoder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from inspect import signature
from math import gcd
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from diffusers.models.embeddings import LabelEmbedding
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.diffusion import TO_V, Prediction, Schedule, expand, v_from_x, x_from_v
from training.guidance import Condition
from training.sections import AutoencoderRecipe, NetworkRecipe, OwnPrediction

GUIDANCE_EMBEDDING_DIM = 256
GUIDANCE_WEIGHTS = "guidance.safetensors"
POOLING_HEADS = 8
PIXELS_AT_ONCE = 1 << 20
LEAST_ALPHA = 5e-3
"""What an eps says of x is divided by alpha. The linear betas of DDPM end above this, a cosine schedule at 5e-5."""

Network: TypeAlias = UNet2DConditionModel | UNet2DModel | DiTTransformer2DModel
AnyNetwork = TypeVar("AnyNetwork", bound=Network)
NETWORKS = {network.__name__: network for network in (UNet2DConditionModel, UNet2DModel, DiTTransformer2DModel)}


def guidance_embedding(w: Tensor, dim: int = GUIDANCE_EMBEDDING_DIM) -> Tensor:
    """Fourier features of w, shape (B, dim): diffusers' get_guidance_scale_embedding, traceable.

    Frequencies exp(-ln(10000) k / (dim/2 - 1)) of 1000 w, sines then cosines.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=w.device) / (half - 1)
    angles = 1000.0 * w.float()[:, None] * torch.pow(10000.0, -exponents)[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class GuidanceInput(nn.Module):
    """Where w enters a network that has no input for it: a projection of its features, added to each time embedding.

    A UNet2DConditionModel needs none of this: it has `timestep_cond`.
    """

    def __init__(self, network: UNet2DModel | DiTTransformer2DModel) -> None:
        """Hook onto the network's embeddings; the projections are zero at first."""
        super().__init__()
        if isinstance(network, UNet2DModel):
            embeddings: Sequence[nn.Module] = [network.time_embedding]
            dim = network.time_embedding.linear_2.out_features
        else:
            embeddings = [block.norm1.emb for block in network.transformer_blocks]
            dim = network.inner_dim
        projections = [nn.Linear(GUIDANCE_EMBEDDING_DIM, dim, bias=False) for _ in embeddings]
        self.projections = nn.ModuleList(projections)
        self._features = _Features()
        for embedding, projection in zip(embeddings, projections, strict=True):
            nn.init.zeros_(projection.weight)
            embedding.register_forward_hook(_AddGuidance(projection, self._features))

    @contextmanager
    def given(self, w: Tensor) -> Iterator[None]:
        """Let the network see w (B,) within. Under gradients longer: checkpointing may call parts of it again."""
        self._features.value = guidance_embedding(w)
        yield
        if not torch.is_grad_enabled():
            self._features.value = None


class _Features:
    """The features of w in the call that goes on, if any. An object, which copying and tracing leave in one piece."""

    value: Tensor | None = None


class _AddGuidance:
    """The hook on one embedding. An object, so that a copy of the whole network refers to its own projection."""

    def __init__(self, projection: nn.Module, features: _Features) -> None:
        self.projection, self.features = projection, features

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        features = self.features.value
        return output if features is None else output + self.projection(features.to(output.dtype))


class NetworkDenoiser(nn.Module):
    """A network as a Denoiser: v from (z, t, condition), and w where it is a student.

    Conditions: `context` (B, L, D) for text, with `pooled` (B, P) and `size` (B, 6) for SDXL; `label` (B,) for classes;
    `mask` (B, 1, h, w) and `masked` (B, c, h, w) for inpainting networks, which see them beside z.
    """

    def __init__(
        self,
        network: Network,
        schedule: Schedule,
        prediction: Prediction = "v",
        guidance_input: GuidanceInput | None = None,
    ) -> None:
        """`prediction` is what the network gives; it counts timesteps 0..T - 1 of the schedule."""
        super().__init__()
        self.network, self.schedule, self.prediction, self.guidance_input = (
            network, schedule, prediction, guidance_input,
        )  # fmt: skip
        self._last = schedule.last_time(LEAST_ALPHA) if prediction == "eps" else 1.0
        self.takes_timestep_cond = network.config.get("time_cond_proj_dim") is not None

    def forward(self, z: Tensor, t: Tensor, condition: Condition, w: Tensor) -> Tensor:
        """Predict v with shape (B, c, h, w) at times t (B,) in [0, 1]."""
        if self.prediction == "v":
            return self._call(z, (t * self.schedule.timesteps - 1).clamp(min=0), condition, w).to(z.dtype)
        t = t.clamp(min=1 / self.schedule.timesteps)  # where networks begin, and sigma is not 0
        asked = t.clamp(max=self._last)
        alpha, sigma = self.schedule.at(asked, z)
        if self.prediction == "flow":
            size = alpha + sigma
            output = self._call(z / size, (self.schedule.timesteps * sigma / size).flatten(), condition, w)
        else:
            output = self._call(z, asked * self.schedule.timesteps - 1, condition, w)
        v = TO_V[self.prediction](z, output.to(z.dtype), alpha, sigma)
        if self._last == 1:
            return v
        x = x_from_v(z, v, alpha, sigma)  # z is all but the same noise later: so is what it says of x
        return torch.where(expand(t > asked, z), v_from_x(z, x, *self.schedule.at(t, z)), v)

    def _call(self, z: Tensor, timestep: Tensor, condition: Condition, w: Tensor) -> Tensor:
        with self.guidance_input.given(w) if self.guidance_input is not None else nullcontext():
            return self._output(z, timestep, condition, w)[:, : z.shape[1]]  # a DiT may give a variance after it

    def _output(self, z: Tensor, timestep: Tensor, condition: Condition, w: Tensor) -> Tensor:
        output: Tensor
        if isinstance(self.network, UNet2DConditionModel):
            added = (
                {"text_embeds": condition["pooled"], "time_ids": condition["size"]} if "pooled" in condition else None
            )
            output = self.network(
                torch.cat([z, condition["mask"], condition["masked"]], dim=1) if "mask" in condition else z,
                timestep,
                encoder_hidden_states=condition.get("context"),
                class_labels=condition.get("label"),
                timestep_cond=guidance_embedding(w).to(z) if self.takes_timestep_cond else None,
                added_cond_kwargs=added,
                return_dict=False,
            )[0]
        elif isinstance(self.network, UNet2DModel):
            label = condition["label"] if self.network.class_embedding is not None else None
            output = self.network(z, timestep, class_labels=label, return_dict=False)[0]
        else:
            output = self.network(z, timestep=timestep, class_labels=condition["label"], return_dict=False)[0]
        return output


def student_from(teacher: NetworkDenoiser, prediction: OwnPrediction = "v") -> NetworkDenoiser:
    """A student with the teacher's weights and an input for w whose projection is zero.

    So the untrained student of a teacher that predicts the same equals it, without guidance, at every w. A student is
    copied as it is.
    """
    network = teacher.network
    if not isinstance(network, UNet2DConditionModel):
        copied = _without_hooks(network)
        student = NetworkDenoiser(copied, teacher.schedule, prediction, GuidanceInput(copied))
        if teacher.guidance_input is not None and student.guidance_input is not None:
            student.guidance_input.load_state_dict(teacher.guidance_input.state_dict())
        return student
    made = _untrained(network, time_cond_proj_dim=GUIDANCE_EMBEDDING_DIM)
    weights = dict(network.state_dict())
    projection = "time_embedding.cond_proj.weight"
    weights.setdefault(projection, torch.zeros_like(made.state_dict()[projection]))
    made.load_state_dict(weights)
    never_drop(made)
    return NetworkDenoiser(made, teacher.schedule, prediction)


def of_side(denoiser: NetworkDenoiser, side: int) -> None:
    """Note the side of z that a network learned on, which stock pipelines make images of when they are told no size."""
    if isinstance(denoiser.network, UNet2DConditionModel):
        denoiser.network.register_to_config(sample_size=side)


def _without_hooks(network: UNet2DModel | DiTTransformer2DModel) -> UNet2DModel | DiTTransformer2DModel:
    """A copy of the network alone, whose labels are never dropped at random: what is dropped is decided outside."""
    made = _untrained(network)
    made.load_state_dict(network.state_dict())
    never_drop(made)
    return made


def _untrained(network: AnyNetwork, **changes: Any) -> AnyNetwork:
    """A network of the same settings but for `changes`. Those of other classes, which diffusers keeps, are left out."""
    known = signature(type(network)).parameters
    config = {key: value for key, value in network.config.items() if key in known}
    with torch.device(network.device):
        made: AnyNetwork = type(network)(**{**config, **changes})
    return made


def never_drop(network: nn.Module) -> None:
    """Keep a network in training from dropping values, and a DiT labels, at random: a run could not repeat itself."""
    for module in network.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0
        elif isinstance(module, nn.Dropout):
            module.p = 0.0


def compile_network(network: nn.Module) -> None:
    """Compile in place, forward and backward.

    Without inductor's own choice of memory layouts: in torch 2.13 on a CPU, where a network has more than 64 channels
    somewhere, that loses the gradients of all that lies beneath an upsampling, and the loss does not show it.
    """
    network.compile(options={"layout_optimization": False})


def save_network(denoiser: NetworkDenoiser, folder: Path) -> None:
    """Write the network in diffusers' format, and beside it how w enters where diffusers has no place for that."""
    denoiser.network.save_pretrained(folder)
    if denoiser.guidance_input is not None:
        save_file(denoiser.guidance_input.state_dict(), folder / GUIDANCE_WEIGHTS)


def load_network(folder: Path, schedule: Schedule, prediction: OwnPrediction = "v") -> NetworkDenoiser:
    """What `save_network` wrote. Raises OSError or ValueError for a folder that holds no such network."""
    name = json.loads((folder / "config.json").read_text()).get("_class_name")
    network = NETWORKS[name].from_pretrained(folder, local_files_only=True)
    never_drop(network)
    guidance_input = None
    if (folder / GUIDANCE_WEIGHTS).exists():
        guidance_input = GuidanceInput(network)
        guidance_input.load_state_dict(load_file(folder / GUIDANCE_WEIGHTS))
    return NetworkDenoiser(network, schedule, prediction, guidance_input)


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
    return latents.to(images.dtype)


def same_latents(one: AutoencoderKL | None, other: AutoencoderKL | None) -> bool:
    """Whether two autoencoders, or none, give an image the same latents, but for rounding; decoders may differ."""
    if one is None or other is None:
        return one is other
    ours, theirs = (_encoder_weights(autoencoder) for autoencoder in (one, other))
    return (
        one.config["scaling_factor"] == other.config["scaling_factor"]
        and {name: value.shape for name, value in ours.items()} == {name: v.shape for name, v in theirs.items()}
        and all(torch.allclose(value, theirs[name], rtol=1e-2, atol=1e-4) for name, value in ours.items())
    )


def _encoder_weights(autoencoder: AutoencoderKL) -> dict[str, Tensor]:
    return {
        name: value for name, value in autoencoder.state_dict().items() if name.startswith(("encoder.", "quant_conv."))
    }


def decode(autoencoder: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images (B, 3, H, W) of scaled latents (B, c, h, w)."""
    images: Tensor = autoencoder.decode(latents / autoencoder.config["scaling_factor"], return_dict=False)[0]
    return images.to(latents.dtype)


@torch.inference_mode()
def encode_all(autoencoder: AutoencoderKL, images: Tensor, device: torch.device) -> Tensor:
    """Scaled latents (N, c, h, w) on the CPU of images (N, 3, H, W)."""
    rows = _rows_at_once(images.shape[-1])
    return torch.cat([encode(autoencoder, part.to(device)).cpu() for part in images.split(rows)])


@torch.inference_mode()
def decode_all(autoencoder: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images (N, 3, H, W) of scaled latents (N, c, h, w)."""
    rows = _rows_at_once(latents.shape[-1] << (len(autoencoder.config["block_out_channels"]) - 1))
    return torch.cat([decode(autoencoder, part) for part in latents.split(rows)])


def _rows_at_once(side: int) -> int:
    """Images that pass an autoencoder together: a megapixel, and 256 at most."""
    return max(1, min(256, PIXELS_AT_ONCE // side**2))
