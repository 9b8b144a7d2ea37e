"""What the losses are fed: all data of a run in memory as tensors, with the captions' contexts or the labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from training.data.captioned import CaptionedImages
from training.data.digits import CLASSES, load_digits_images
from training.data.order import BatchOrder, Order
from training.draws import Draws
from training.guidance import Condition, of_rows
from training.losses import Batch
from training.pictures import from_uint8
from training.prompts import PromptEncoder, encode_captions
from training.recipe import Recipe
from training.sections import DataRecipe
from training.store import hash_of, hash_of_array

SHOWN_SKIPPED = 20


class Data(Protocol):
    """What a run learns from, in memory or streamed."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (c, h, w) of one item."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, if it has any."""
        ...

    @property
    def fingerprint(self) -> str:
        """A hash of all that is learned from."""
        ...

    def __len__(self) -> int:
        """The number of items."""
        ...

    def order(self, batch_size: int, seed: int) -> Order:
        """The order in which items are learned from."""
        ...

    def excerpt(self, shards: int) -> range:
        """Items to look at: all that are in memory, of a stream those of so many neighbouring shards."""
        ...

    def prefetch(self, items: Tensor) -> None:
        """Prepare for coming items (B,)."""
        ...

    def batch(self, items: Tensor, draws: Draws, device: torch.device) -> Batch:
        """The items (B,) on `device`, each with one of its conditions."""
        ...


@dataclass(frozen=True)
class Captions:
    """Arrays (M, *) of the distinct captions; `owned[i]` lists the rows that describe item i."""

    arrays: Condition
    owned: tuple[tuple[int, ...], ...]

    @classmethod
    def encode(cls, texts: Sequence[Sequence[str]], encoder: PromptEncoder, cache: Path) -> Captions:
        """Encode every distinct caption once. `texts[i]` are the captions of item i, at least one."""
        rows = {caption: row for row, caption in enumerate(sorted({c for item in texts for c in item}))}
        arrays = encode_captions(encoder, tuple(rows), cache)
        return cls(arrays, tuple(tuple(rows[c] for c in item) for item in texts))


@dataclass(frozen=True)
class TrainingSet:
    """Data x (N, c, h, w) and its condition: captions, one drawn at random each time, or labels (N,) into `classes`.

    `fingerprint` is a hash of the images and of their captions or classes; `constants` are conditions that every row
    has, each without a batch dimension.
    """

    x: Tensor
    condition: Captions | Tensor
    fingerprint: str
    classes: tuple[str, ...] = ()
    constants: Condition = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (c, h, w) of one item."""
        channels, height, width = self.x.shape[1:]
        return channels, height, width

    def __len__(self) -> int:
        """N."""
        return len(self.x)

    def order(self, batch_size: int, seed: int) -> BatchOrder:
        """The order in which items are learned from."""
        return BatchOrder(len(self), batch_size, seed)

    def excerpt(self, shards: int) -> range:
        """All items."""
        return range(len(self))

    def prefetch(self, items: Tensor) -> None:
        """All is in memory."""

    def batch(self, items: Tensor, draws: Draws, device: torch.device) -> Batch:
        """The items (B,) on `device`, each with one of its conditions."""
        x = self.x[items].to(device)
        constants = {name: of_rows(value, x) for name, value in self.constants.items()}
        if isinstance(self.condition, Tensor):
            return Batch(x, {"label": self.condition[items].to(device), **constants})
        owned = [self.condition.owned[int(i)] for i in items]
        choices = draws.uniform().tolist()
        rows = torch.tensor([own[int(choice * len(own))] for own, choice in zip(owned, choices, strict=True)])
        arrays = {name: array[rows].to(device, torch.float32) for name, array in self.condition.arrays.items()}
        return Batch(x, {**arrays, **constants})


def to_tensor(images: NDArray[np.uint8]) -> Tensor:
    """Float images (N, 3, H, W) in [-1, 1] of uint8 images (N, H, W, 3)."""
    return from_uint8(torch.from_numpy(images).permute(0, 3, 1, 2)).contiguous()


def open_images(recipe: DataRecipe, split: str) -> CaptionedImages:
    """The images of a split that the recipe asks for."""
    assert recipe.path is not None
    images = CaptionedImages.open(
        recipe.path, split, recipe.size, recipe.background, groups=recipe.groups or None, fit=recipe.fit
    )
    for skipped in images.skipped[:SHOWN_SKIPPED]:
        tqdm.write(f"skipped {skipped}")
    if (more := len(images.skipped) - SHOWN_SKIPPED) > 0:
        tqdm.write(f"skipped {more} more: `fewstep data check {recipe.path}` names them all")
    return images


def load_pixels(recipe: DataRecipe, split: str) -> Tensor:
    """All images of a split, of every group, without their conditions: (N, 3, H, W), for an autoencoder."""
    if recipe.source == "digits":
        return to_tensor(load_digits_images(recipe.size, split)[0])
    images = open_images(recipe.model_copy(update={"groups": ()}), split)
    return to_tensor(images.pixels())


def load_training_set(recipe: Recipe, split: str, cache: Path, prompts: PromptEncoder | None) -> TrainingSet:
    """The data of a split in pixel space: captions encoded by `prompts` and kept in `cache`, or classes numbered."""
    if recipe.data.source == "digits":
        pixels, labels = load_digits_images(recipe.data.size, split)
        return _labelled(pixels, labels, CLASSES)
    images = open_images(recipe.data, split)
    pixels = images.pixels()
    if prompts is None:
        classes = (images if split == "train" else open_images(recipe.data, "train")).classes
        return _labelled(pixels, images.labels_in(classes), classes)
    texts = [images.texts(i) for i in range(len(images))]
    fingerprint = captioned_fingerprint(pixels, texts)
    return TrainingSet(to_tensor(pixels), Captions.encode(texts, prompts, cache), fingerprint)


def captioned_fingerprint(pixels: NDArray[np.uint8], texts: Sequence[Sequence[str]]) -> str:
    """A hash of images (N, H, W, 3) and of the captions of each."""
    return hash_of({"pixels": hash_of_array(pixels), "texts": texts})


def _labelled(pixels: NDArray[np.uint8], labels: NDArray[np.int64], classes: tuple[str, ...]) -> TrainingSet:
    fingerprint = hash_of({"pixels": hash_of_array(pixels), "labels": labels.tolist(), "classes": classes})
    return TrainingSet(to_tensor(pixels), torch.from_numpy(labels), fingerprint, classes)
