"""What an evaluation compares: conditions to generate for, their real images, and a reference of other real images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.data.digits import CLASSES, load_digits_images
from training.data.entries import DataError
from training.data.training_set import captioned_fingerprint, open_images
from training.evaluation.features import Pixels
from training.guidance import Condition, of_rows
from training.prompts import encode_captions
from training.recipe import Recipe
from training.run import Run
from training.sections import DataRecipe


@dataclass(frozen=True)
class EvaluationSet:
    """N conditions in words and as tensors, the real images that they describe, and M others as the reference.

    `words` are captions or names of classes; `encoding` names what made tensors of them. Image i belongs to
    condition i. Where there are fewer images than N, the conditions after them are the same ones again.
    """

    split: str
    description: str
    words: tuple[str, ...]
    encoding: str
    condition: Condition
    images: Pixels
    reference: Pixels

    def __len__(self) -> int:
        """N."""
        return len(self.words)


@dataclass(frozen=True)
class _Split:
    """All images of a split, with the captions, or the class and its label, of each."""

    images: Pixels
    texts: tuple[tuple[str, ...], ...]
    labels: NDArray[np.int64] | None = None


def load_evaluation_set(run: Run, split: str, samples: int, seed: int, images: Path | None = None) -> EvaluationSet:
    """The conditions of `samples` images of a split, in a random order: one caption an image, drawn at random.

    With more samples than images the conditions of all of them are used again, in a new random order each time.
    The images of the training split are halved at random: conditions come from one half, the other is the
    reference. For another split the reference is the training split. So no image is on both sides, and the real
    images of the conditions are what a perfect model would make. `images` is an image set to compare with instead of
    the recipe's own. Raises DataError for images that cannot be had, and TrainingError for others of the recipe's own
    than the run has learned from.
    """
    recipe = _compared(run, images)
    classes = run.data.classes if images is not None else ()
    data = _load_split(recipe, split, classes)
    random = np.random.Generator(np.random.PCG64(seed))
    order = random.permutation(len(data.images))
    drawn = [own[int(random.random() * len(own))] for own in data.texts]
    if split == "train":
        half = len(order) // 2
        chosen, train = order[:half], data
        reference = train.images[order[half:]]
        description = f"{split}, halved at random: one half gives the captions or classes, the other is the reference"
    else:
        chosen, train = order, _load_split(recipe, "train", classes)
        reference = train.images
        description = f"{split} gives the captions or classes, train is the reference"
    if images is None and train.labels is None:  # Labels are numbered by the run's data, which see to it.
        run.known("denoiser", captioned_fingerprint(train.images, train.texts))
    if not len(chosen):
        raise DataError(f"the split {split} has too few images to give any conditions")
    passes = -(-samples // len(chosen))
    again = [random.permutation(len(chosen)) for _ in range(passes - 1)]
    chosen = chosen[:samples]
    use = np.concatenate([np.arange(len(chosen)), *again])[:samples]
    words = tuple(drawn[i] for i in chosen)
    labels = None if data.labels is None else torch.from_numpy(data.labels[chosen])
    once, encoding = _encode(run, words, labels)
    condition = {name: value[torch.from_numpy(use)] for name, value in once.items()}
    words = tuple(words[i] for i in use)
    return EvaluationSet(split, description, words, encoding, condition, data.images[chosen], reference)


def _encode(run: Run, words: tuple[str, ...], labels: Tensor | None) -> tuple[Condition, str]:
    if labels is not None:
        return {"label": run.class_numbers[labels]}, "labels"
    assert run.prompts is not None
    arrays = {name: array.float() for name, array in encode_captions(run.prompts, words, run.cache).items()}
    some = next(iter(arrays.values()))
    return arrays | {name: of_rows(value, some) for name, value in run.constants.items()}, run.prompts.identity


def _compared(run: Run, images: Path | None) -> Recipe:
    """The recipe with the images that are compared with."""
    data = run.recipe.data
    if images is not None:
        folder = DataRecipe(path=images, size=data.size, background=data.background, fit=data.fit)
        return run.recipe.model_copy(update={"data": folder})
    if data.source == "stream":
        raise DataError("the recipe streams its images: name a folder of images to compare with, by --images")
    return run.recipe


def _load_split(recipe: Recipe, split: str, classes: tuple[str, ...] = ()) -> _Split:
    """With `classes`, those of other images, labels count these."""
    if recipe.data.source == "digits":
        pixels, labels = load_digits_images(recipe.data.size, split)
        return _Split(pixels, tuple((CLASSES[label],) for label in labels), labels)
    images = open_images(recipe.data, split)
    pixels = images.pixels()
    if recipe.conditioning == "text":
        return _Split(pixels, tuple(images.texts(i) for i in range(len(images))))
    classes = classes or (images if split == "train" else open_images(recipe.data, "train")).classes
    labels = images.labels_in(classes)
    return _Split(pixels, tuple((classes[label],) for label in labels), labels)
