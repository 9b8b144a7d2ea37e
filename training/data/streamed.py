"""Training data that are streamed from shards: of precomputed tensors, or of images that are encoded as they come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import zip_longest

import torch
from torch import Tensor

from training.data.order import ShardOrder
from training.data.place import Place, StreamError
from training.data.shard_contents import DATA, ImageFit
from training.data.shard_index import MadeWith, ShardIndex
from training.data.stream import ShardStream
from training.draws import Draws
from training.guidance import Condition, of_rows
from training.losses import Batch
from training.pictures import from_uint8
from training.prompts import PromptEncoder
from training.sections import DataRecipe


def open_stream(recipe: DataRecipe) -> ShardStream:
    """The shards that a recipe names. Raises StreamError when they cannot be had."""
    assert recipe.address is not None
    of_images = ShardIndex.read(Place(recipe.address)).kind == "images"
    fit = ImageFit(recipe.size, recipe.background, recipe.fit) if of_images else None
    return ShardStream(recipe.address, recipe.window, fit)


def require_fit(stream: ShardStream, shape: tuple[int, int, int], condition: Condition, made_with: MadeWith) -> None:
    """Raise StreamError for tensors unlike what a run needs: x of a `shape`, and a `condition` like that of one row.

    What the shards were made with is compared where their index says it.
    """
    address, told = stream.place.address, stream.index.made_with
    found = {name: tuple(spec.shape) for name, spec in stream.specs.items()}
    wanted = {DATA: shape, **{name: tuple(value.shape) for name, value in condition.items()}}
    if found != wanted:
        raise StreamError(f"{address} holds {_listed(found)}; {_listed(wanted)} is needed")
    for name, value in condition.items():
        dtype = stream.specs[name].dtype
        if dtype.startswith("float") != value.is_floating_point():
            needed = "floating point" if value.is_floating_point() else "whole numbers"
            raise StreamError(f"{address} holds {name} of {dtype}; {needed} are needed")
    if told is None:
        return
    for label, (theirs, ours) in enumerate(zip_longest(told.classes, made_with.classes, fillvalue="no class")):
        if theirs != ours:
            raise StreamError(f"{address}: label {label} is {theirs} there, and {ours} in the recipe's classes")
    if told.autoencoder != made_with.autoencoder:
        raise StreamError(f"{address} was made with another autoencoder than this run has; precompute again")
    if told.prompts != made_with.prompts:
        raise StreamError(f"{address} was made with another encoder of prompts than this run has; precompute again")
    if told.fit != made_with.fit:
        theirs, ours = (fit or "pad" for fit in (told.fit, made_with.fit))
        raise StreamError(f'{address} was made with data.fit = "{theirs}", and the recipe has "{ours}"')


def _listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in sorted(shapes.items()))


@dataclass(frozen=True)
class _Streamed:
    stream: ShardStream

    @property
    def fingerprint(self) -> str:
        """A hash of all bytes of the set."""
        return self.stream.fingerprint

    def __len__(self) -> int:
        """The number of items."""
        return len(self.stream)

    def order(self, batch_size: int, seed: int) -> ShardOrder:
        """The order in which items are learned from."""
        return ShardOrder(self.stream.counts, batch_size, seed, self.stream.window)

    def excerpt(self, shards: int) -> range:
        """The items of the first shards."""
        return range(sum(self.stream.counts[:shards]))

    def prefetch(self, items: Tensor) -> None:
        """Read the shards of coming items in the background."""
        self.stream.prefetch(items)


@dataclass(frozen=True)
class StreamedTensors(_Streamed):
    """Shards of precomputed data x and conditions, as `fewstep precompute` writes them.

    `numbers` (K,) are those that the teacher has for the `classes`.
    """

    classes: tuple[str, ...] = ()
    numbers: Tensor | None = None
    constants: Condition = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (c, h, w) of one item."""
        return self.stream.shape

    def batch(self, items: Tensor, draws: Draws, device: torch.device) -> Batch:
        """The items (B,) on `device`, each with one of its conditions."""
        parts = self.stream.parts(items, draws.uniform())
        if "label" in parts and self.numbers is not None:
            labels = parts["label"].long()  # torch takes uint8 for a mask
            if outside := [label for label in labels.tolist() if not 0 <= label < len(self.numbers)]:
                raise StreamError(f"a label is {outside[0]}, and there are {len(self.numbers)} classes")
            parts["label"] = self.numbers[labels]
        parts = {name: value.to(device) for name, value in parts.items()}
        parts = {name: value.float() if value.is_floating_point() else value for name, value in parts.items()}
        x = parts.pop(DATA)
        return Batch(x, {**parts, **{name: of_rows(value, x) for name, value in self.constants.items()}})


@dataclass(frozen=True)
class StreamedImages(_Streamed):
    """Shards of captioned images. `to_x` makes x (B, c, h, w) of images (B, 3, H, W) in [-1, 1], on their device."""

    prompts: PromptEncoder
    to_x: Callable[[Tensor], Tensor]
    shape: tuple[int, int, int]
    constants: Condition = field(default_factory=dict)
    classes: tuple[str, ...] = ()

    def images(self, items: Tensor) -> Tensor:
        """The images (B, 3, H, W) in [-1, 1] of items (B,)."""
        return from_uint8(self.stream.parts(items)[DATA])

    def batch(self, items: Tensor, draws: Draws, device: torch.device) -> Batch:
        """The items (B,) on `device`, encoded now, in fp32 like those in memory, each with one of its captions."""
        texts, choices = self.stream.texts(items), draws.uniform().tolist()
        chosen = [own[int(choice * len(own))] for own, choice in zip(texts, choices, strict=True)]
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            x = self.to_x(self.images(items).to(device))
            context = {name: value.to(device) for name, value in self.prompts.encode(chosen).items()}
        return Batch(x, {**context, **{name: of_rows(value, x) for name, value in self.constants.items()}})
