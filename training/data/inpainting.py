"""What inpainting networks are trained on: latents, a random mask, and the latent of the image that it leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn.functional import interpolate

from training import networks
from training.data.order import Order
from training.data.training_set import Data
from training.draws import Draws
from training.guidance import Condition
from training.losses import Batch

WHOLE_SHARE = 0.25
SMALLEST_SIDE = 0.2


@dataclass(frozen=True)
class InpaintingSet:
    """Data whose batches have a mask each, new every time.

    `images` gives those of items (B,), each (3, side, side) in [-1, 1].
    """

    latents: Data
    images: Callable[[Tensor], Tensor]
    side: int
    autoencoder: AutoencoderKL

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (c, h, w) of one item."""
        return self.latents.shape

    @property
    def classes(self) -> tuple[str, ...]:
        """None."""
        return self.latents.classes

    @property
    def fingerprint(self) -> str:
        """A hash of the images and their captions."""
        return self.latents.fingerprint

    def __len__(self) -> int:
        """N."""
        return len(self.latents)

    def order(self, batch_size: int, seed: int) -> Order:
        """The order in which items are learned from."""
        return self.latents.order(batch_size, seed)

    def excerpt(self, shards: int) -> range:
        """Items to look at."""
        return self.latents.excerpt(shards)

    def prefetch(self, items: Tensor) -> None:
        """Prepare for a coming batch of items (B,)."""
        self.latents.prefetch(items)

    def batch(self, items: Tensor, draws: Draws, device: torch.device) -> Batch:
        """The items (B,) on `device`, each with one of its captions, a mask and what it leaves, encoded in fp32."""
        batch = self.latents.batch(items, draws, device)
        mask = random_masks(draws, self.side).to(device)
        with torch.autocast(device.type, enabled=False):
            masked = masked_condition(self.autoencoder, self.images(items).to(device), mask)
        return Batch(batch.x, {**batch.condition, **masked})


def random_masks(draws: Draws, side: int) -> Tensor:
    """Masks (B, 1, side, side), 1 to repaint: at times the whole image, else a rectangle of at least about a fifth."""
    whole = draws.uniform() < WHOLE_SHARE
    places = torch.arange(side, dtype=torch.float64) + 0.5
    inside = []
    for _ in range(2):
        length = side * (SMALLEST_SIDE + (1 - SMALLEST_SIDE) * draws.uniform())
        first = (side - length) * draws.uniform()
        inside.append((places >= first[:, None]) & (places < (first + length)[:, None]))
    rectangle = inside[0][:, :, None] & inside[1][:, None, :]
    return (rectangle | whole[:, None, None])[:, None].float()


@torch.no_grad()
def masked_condition(autoencoder: AutoencoderKL, images: Tensor, mask: Tensor) -> Condition:
    """`mask` (B, 1, h, w) at the latent's size and `masked` (B, c, h, w), as the stock inpainting pipeline makes them.

    Images (B, 3, H, W) in [-1, 1], mask (B, 1, H, W) with 1 to repaint.
    """
    masked = networks.encode(autoencoder, images * (mask < 0.5))
    return {"mask": interpolate(mask, size=masked.shape[-2:]), "masked": masked}


def all_masked(autoencoder: AutoencoderKL, side: int) -> Condition:
    """The condition of one row that leaves nothing of an image: what makes an inpainting network generate."""
    device = next(autoencoder.parameters()).device
    image, mask = torch.zeros(1, 3, side, side, device=device), torch.ones(1, 1, side, side, device=device)
    return {name: value[0].cpu() for name, value in masked_condition(autoencoder, image, mask).items()}
