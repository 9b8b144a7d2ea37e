"""`fewstep precompute`: latents and conditions of a recipe's images, once and for all, as shards that a run streams."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from training import networks
from training.commands import FOLDER, RECIPE, Reported, open_run
from training.data.shard_contents import DATA
from training.data.shard_writer import TensorShardWriter
from training.data.streamed import open_stream
from training.data.training_set import open_images, to_tensor
from training.loop import TrainingError
from training.run import Run
from training.store import hash_of

ROWS = 32


@dataclass(frozen=True)
class Some:
    """A few images (N, 3, H, W) in [-1, 1], with the captions of each, or their classes (N,)."""

    images: Tensor
    texts: Sequence[Sequence[str]] = ()
    labels: NDArray[np.int64] | None = None


def precompute(run: Run, address: str, per_shard: int) -> int:
    """Write x and the conditions of every training image of the run's recipe; returns how many there are.

    Goes on where it was stopped. Raises StreamError for a place that holds other data, TrainingError for a recipe whose
    images are tensors already.
    """
    fingerprint, total, parts = _images(run)
    source = hash_of(
        {
            "images": fingerprint,
            "size": run.recipe.data.size,
            "autoencoder": run.weights("autoencoder") if run.is_latent else None,
            "prompts": run.prompts.identity if run.prompts else None,
        }
    )
    with TensorShardWriter(address, per_shard, source) as writer:
        first = writer.done
        with tqdm(total=total, initial=first, desc="precomputing", unit="image", disable=None) as bar:
            for sample in _encoded(run, parts(first)):
                writer.write(sample)
                bar.update()
        return writer.count


def _images(run: Run) -> tuple[str, int, Callable[[int], Iterator[Some]]]:
    """A hash of the images, how many they are, and what gives them a few at a time from an item on."""
    recipe = run.recipe.data
    if recipe.source == "stream":
        stream = open_stream(recipe)
        if stream.index.kind != "images":
            raise TrainingError(f"{recipe.address} holds tensors already")

        def streamed(first: int) -> Iterator[Some]:
            for items in torch.arange(first, len(stream)).split(ROWS):
                pixels = stream.parts(items)[DATA].float().div(127.5).sub(1)
                yield Some(pixels, stream.texts(items))

        return stream.fingerprint, len(stream), streamed
    if recipe.source == "digits":
        raise TrainingError("the digits fit in memory: there is nothing to precompute")
    images = open_images(recipe, "train")
    labels = images.labels if run.prompts is None else None

    def read(first: int) -> Iterator[Some]:
        for start in range(first, len(images), ROWS):
            rows = range(start, min(start + ROWS, len(images)))
            pixels = to_tensor(np.stack([images.image(i) for i in rows]))
            own = None if labels is None else labels[rows.start : rows.stop]
            yield Some(pixels, [images.texts(i) for i in rows], own)

    pixels = hashlib.sha256()
    for i in tqdm(range(len(images)), desc="hashing", unit="image", leave=False, disable=None):
        pixels.update(images.image(i).tobytes())
    texts = [images.texts(i) for i in range(len(images))]
    return hash_of({"pixels": pixels.hexdigest(), "texts": texts}), len(images), read


@torch.inference_mode()
def _encoded(run: Run, parts: Iterator[Some]) -> Iterator[dict[str, NDArray[np.generic]]]:
    autoencoder = run.autoencoder() if run.is_latent else None
    for some in parts:
        images = some.images.to(run.device)
        x = images if autoencoder is None else networks.encode(autoencoder, images)
        for data, condition in zip(x.half().cpu().numpy(), _conditions(run, some), strict=True):
            yield {DATA: data, **condition}


def _conditions(run: Run, some: Some) -> Iterator[dict[str, NDArray[np.generic]]]:
    """The arrays of each image, with a first axis over its captions."""
    if run.prompts is None:
        assert some.labels is not None
        yield from ({"label": label[None]} for label in some.labels)
        return
    arrays = run.prompts.encode([caption for own in some.texts for caption in own])
    end = 0
    for own in some.texts:
        start, end = end, end + len(own)
        yield {name: rows[start:end].half().numpy() for name, rows in arrays.items()}


@click.command("precompute", cls=Reported)
@click.argument("recipe", type=RECIPE)
@click.argument("address")
@click.option("--out", type=click.Path(path_type=Path), help="The run's folder.  [default: runs/NAME]")
@click.option("--data", type=FOLDER, help="The image set, instead of the recipe's.")
@click.option("--per-shard", type=click.IntRange(min=1), default=2048, show_default=True, help="Images in a shard.")
def command(recipe: Path, address: str, out: Path | None, data: Path | None, per_shard: int) -> None:
    """Write the latents and conditions of RECIPE's images as shards at ADDRESS, a folder or any fsspec address.

    A recipe streams them with data = { source = "stream", address = ADDRESS, size = ... }. An autoencoder that the
    recipe trains must be trained before. What was stopped goes on where it was.
    """
    count = precompute(open_run(recipe, out, data), address, per_shard)
    click.echo(f"{address}: {count} items")
