"""`fewstep precompute`: latents and conditions of a recipe's images, once and for all, as shards that a run streams."""

from __future__ import annotations

import hashlib
import json
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
from training.data.captioned import WHITE, CaptionedImages
from training.data.place import Place
from training.data.shard_contents import DATA
from training.data.shard_index import ShardIndex
from training.data.shard_writer import TensorShardWriter
from training.data.stream import ShardStream
from training.data.streamed import open_stream
from training.data.training_set import open_images, to_tensor
from training.distill import train_autoencoder
from training.errors import TrainingError
from training.lock import training_alone
from training.pictures import from_uint8
from training.prompts import tell_of_cut
from training.run import Run
from training.sections import DataRecipe
from training.stages import AUTOENCODER
from training.store import hash_of

ROWS = 32


@dataclass(frozen=True)
class Some:
    """A few images (N, 3, H, W) in [-1, 1], with the captions of each, or their classes (N,)."""

    images: Tensor
    texts: Sequence[Sequence[str]] = ()
    labels: NDArray[np.int64] | None = None


class Lengths:
    """How many captions there were, and how many of them lose their end."""

    def __init__(self, run: Run) -> None:
        self.count = self.cut = 0
        self._prompts = run.prompts

    def noted(self, parts: Iterator[Some]) -> Iterator[Some]:
        """The same, once their captions are counted."""
        for some in parts:
            if self._prompts is not None:
                captions = [caption for own in some.texts for caption in own]
                self.count += len(captions)
                self.cut += self._prompts.too_long(captions)
            yield some


@dataclass(frozen=True)
class Images:
    """The training images of a recipe: `parts` gives a few at a time, from one on."""

    count: int
    fingerprint: str
    parts: Callable[[int], Iterator[Some]]
    classes: tuple[str, ...] = ()


def precompute(run: Run, address: str, per_shard: int) -> int:
    """Write x and the conditions of every training image of the run's recipe; returns how many there are.

    An autoencoder that the recipe trains is trained first, unless it is there. Goes on where it was stopped. Raises
    StreamError for a place that holds other data, TeacherError for classes that the teacher does not know, and
    TrainingError for classes that leave none to stand for none, for a recipe whose images are tensors already, or are
    of no use to it as tensors, and where another process is training in the folder that the autoencoder would be
    trained in.
    """
    if run.accelerator.num_processes > 1:
        raise TrainingError("images are precomputed by one process: start it without a launcher")
    if run.pipeline is not None and run.pipeline.is_inpainting:
        raise TrainingError("an inpainting network learns from images, each masked anew each time: precompute nothing")
    images = _images(run)
    if run.pipeline is not None and images.classes:
        run.null_beside(run.pipeline.classes.numbers(images.classes))  # raises for those that cannot be learned from
    if run.recipe.autoencoder is not None and not run.is_done(AUTOENCODER):
        with training_alone(run.folder):
            train_autoencoder(run)
    made_with = run.made_with(images.classes)
    source = {
        "images": images.fingerprint,
        "size": run.recipe.data.size,
        "autoencoder": made_with.autoencoder,
        "prompts": made_with.prompts,
    }
    if made_with.fit:  # left out otherwise, as of shards that are older than it
        source["fit"] = made_with.fit
    if run.recipe.data.background != WHITE:  # likewise
        source["background"] = run.recipe.data.background
    with TensorShardWriter(address, per_shard, hash_of(source), made_with) as writer:
        first = writer.done
        lengths = Lengths(run)
        with tqdm(total=images.count, initial=first, desc="precomputing", unit="image", disable=None) as bar:
            for sample in _encoded(run, lengths.noted(images.parts(first))):
                writer.write(sample)
                bar.update()
        tell_of_cut(lengths.cut, lengths.count)
        return writer.count


def _images(run: Run) -> Images:
    """Raises TrainingError for a recipe that has none to precompute."""
    recipe = run.recipe.data
    if recipe.source == "stream":
        return _streamed(run, open_stream(recipe))
    if recipe.source == "digits":
        raise TrainingError("the digits fit in memory: there is nothing to precompute")
    return _in_folder(run, open_images(recipe, "train"))


def _streamed(run: Run, stream: ShardStream) -> Images:
    address = run.recipe.data.address
    if stream.index.kind != "images":
        raise TrainingError(f"{address} holds tensors already")

    def read(first: int) -> Iterator[Some]:
        for rows in _rows(first, len(stream)):
            items = torch.tensor(rows)
            pixels = from_uint8(stream.parts(items)[DATA])
            labels = None if run.prompts else _labels(stream.classes(items), run.recipe.data)
            texts = stream.texts(items)
            stream.require_whole()  # What stands in for a shard in a run would be written here for good.
            yield Some(pixels, texts, labels)

    return Images(len(stream), stream.fingerprint, read, run.recipe.data.classes)


def _labels(names: Sequence[str | None], recipe: DataRecipe) -> NDArray[np.int64]:
    """The place (N,) of each of N classes among those of the recipe: a .cls counts them, unless they are numbers.

    Raises TrainingError for an image without a class, or with another.
    """
    known = {name: number for number, name in enumerate(recipe.classes)}
    if not any(name.isdecimal() for name in recipe.classes):
        known |= {str(number): number for number in known.values()}
    for name in names:
        if name not in known:
            said = "has no class (a .cls, or a class_name in its .json)" if name is None else f"is of class {name!r}"
            raise TrainingError(f"{recipe.address}: an image {said}; the recipe's are {', '.join(recipe.classes)}")
    return np.array([known[name] for name in names if name is not None], np.int64)


def _in_folder(run: Run, images: CaptionedImages) -> Images:
    labels = images.labels if run.prompts is None else None

    def read(first: int) -> Iterator[Some]:
        for rows in _rows(first, len(images)):
            pixels = to_tensor(np.stack([images.image(i) for i in rows]))
            own = None if labels is None else labels[rows.start : rows.stop]
            yield Some(pixels, [images.texts(i) for i in rows], own)

    pixels = hashlib.sha256()
    for i in tqdm(range(len(images)), desc="hashing", unit="image", leave=False, disable=None):
        pixels.update(images.image(i).tobytes())
    texts = [images.texts(i) for i in range(len(images))]
    of_labels = {} if labels is None else {"labels": labels.tolist()}
    fingerprint = hash_of({"pixels": pixels.hexdigest(), "texts": texts, **of_labels})
    return Images(len(images), fingerprint, read, images.classes if run.prompts is None else ())


def _rows(first: int, count: int) -> Iterator[range]:
    """The numbers from `first` to `count`, a few at a time; nothing where none is left."""
    for start in range(first, count, ROWS):
        yield range(start, min(start + ROWS, count))


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

    An autoencoder that the recipe trains is trained first, unless the run's folder has it. What was stopped goes on
    where it was. At the end the [data] section is printed with which another recipe streams the shards. That recipe
    has no [autoencoder] and, unless it streamed before too, a run folder of its own: another name, or --out.
    """
    run = open_run(recipe, out, data)
    count = precompute(run, address, per_shard)
    click.echo(f"{address}: {count} items. The recipe that streams them has\n\n{section(run, address)}")


def section(run: Run, address: str) -> str:
    """The [data] section of a recipe that streams what a run precomputed, in TOML."""
    made_with = ShardIndex.read(Place(address)).made_with
    entries: dict[str, str | int | Sequence[str]] = {
        "source": "stream",
        "address": address,
        "size": run.recipe.data.size,
    }
    if made_with is not None and made_with.classes:
        entries["classes"] = made_with.classes
    if made_with is not None and made_with.fit:
        entries["fit"] = made_with.fit
    if run.is_latent and run.pipeline is None:
        entries["autoencoder"] = str(run.folder / AUTOENCODER)
    lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in entries.items()]
    return "\n".join(["[data]", *lines])
