"""What inpainting networks learn from."""

from __future__ import annotations

import torch

from tests import pipelines
from training.data.inpainting import InpaintingSet
from training.data.training_set import TrainingSet
from training.draws import Draws


def test_what_a_mask_leaves_is_encoded_in_full_precision() -> None:
    torch.manual_seed(0)
    latents = TrainingSet(torch.zeros(2, 4, 16, 16), torch.tensor([0, 1]), "")
    images = torch.rand(2, 3, pipelines.SIZE, pipelines.SIZE)
    data = InpaintingSet(latents, images.__getitem__, pipelines.SIZE, pipelines.autoencoder())
    items, device = torch.arange(2), torch.device("cpu")
    plain = data.batch(items, Draws(0, 0, range(2)), device).condition["masked"]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = data.batch(items, Draws(0, 0, range(2)), device).condition["masked"]
    assert torch.equal(mixed, plain)
