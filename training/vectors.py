"""A small network for data that are vectors: the Denoiser that is trained where answers are known exactly."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from training.guidance import Condition
from training.networks import GUIDANCE_EMBEDDING_DIM, guidance_embedding

TIME_FEATURES = 128
TIME_SCALE = 1000.0


class _Block(nn.Module):
    """h + W_2 silu((1 + scale) norm(W_1 h) + shift), scale and shift linear in an embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(width, width), nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        for layer in (self.leave, self.modulation):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding).chunk(2, dim=-1)
        modulated = (1 + scale) * self.norm(self.enter(h)) + shift
        output: Tensor = h + self.leave(nn.functional.silu(modulated))
        return output


class VectorDenoiser(nn.Module):
    """v of shape (B, D) from (z, t, label, w) by a residual multi-layer perceptron; w enters by a zero projection."""

    def __init__(self, dimensions: int, classes: int, width: int = 128, blocks: int = 4) -> None:
        """For data (B, D) of `classes` classes and the null class, which is the number after the last."""
        super().__init__()
        self.time = nn.Linear(TIME_FEATURES, width)
        self.label = nn.Embedding(classes + 1, width)
        self.guidance = nn.Linear(GUIDANCE_EMBEDDING_DIM, width, bias=False)
        nn.init.zeros_(self.guidance.weight)
        self.embed = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.enter, self.leave = nn.Linear(dimensions, width), nn.Linear(width, dimensions)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(blocks))

    def forward(self, z: Tensor, t: Tensor, condition: Condition, w: Tensor) -> Tensor:
        """Predict v at times t (B,) for the classes condition["label"] (B,) and weights w (B,)."""
        time = get_timestep_embedding(TIME_SCALE * t, TIME_FEATURES)
        embedding = self.embed(
            self.time(time) + self.label(condition["label"]) + self.guidance(guidance_embedding(w).to(z))
        )
        h = self.enter(z)
        for block in self.blocks:
            h = block(h, embedding)
        v: Tensor = self.leave(torch.nn.functional.silu(h))
        return v
