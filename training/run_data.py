"""The data that a run learns from: images or shards, in the space that its denoiser works in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from training import networks
from training.data.inpainting import InpaintingSet
from training.data.stream import ShardStream
from training.data.streamed import StreamedImages, StreamedTensors, open_stream, require_fit
from training.data.training_set import Data, load_training_set
from training.errors import TrainingError

if TYPE_CHECKING:
    from training.run import Run

UNCHECKED = "its index does not say which autoencoder, encoder of prompts and classes made it: they are unchecked"


def training_data(run: Run) -> Data:
    """The training split of a run. Raises TrainingError if it does not fit, or is another than before."""
    return _streamed(run) if run.recipe.data.source == "stream" else _in_memory(run)


def _in_memory(run: Run) -> Data:
    shape, prompts = run.shape, run.prompts
    with run.accelerator.main_process_first():
        images = load_training_set(run.recipe, "train", run.cache, prompts)
    run.known("denoiser", images.fingerprint)
    if run.pipeline is not None and isinstance(images.condition, Tensor):
        images = replace(images, condition=run.numbers_of(images.classes)[images.condition])
    if not run.is_latent:
        if images.shape != shape:
            raise TrainingError(f"the images are {images.shape}, the teacher makes {shape}")
        return images
    latents = networks.encode_all(run.autoencoder(), images.x, run.device)
    return _masked(run, replace(images, x=latents, constants=run.constants), images.x.__getitem__)


def _streamed(run: Run) -> Data:
    stream = open_stream(run.recipe.data)
    data = _of_images(run, stream) if stream.index.kind == "images" else _of_tensors(run, stream)
    run.known("denoiser", data.fingerprint)
    return data


def _of_images(run: Run, stream: ShardStream) -> Data:
    if run.prompts is None:
        raise TrainingError(
            f"{run.recipe.data.address}: images are streamed with captions only; `fewstep precompute` makes shards of "
            "those with classes, which are streamed"
        )
    encode = partial(networks.encode, run.autoencoder()) if run.is_latent else lambda images: images
    streamed = StreamedImages(stream, run.prompts, encode, run.shape, run.constants)
    return _masked(run, streamed, streamed.images)


def _of_tensors(run: Run, stream: ShardStream) -> Data:
    recipe = run.recipe.data
    if "background" in recipe.model_fields_set:
        raise TrainingError(
            f"{recipe.address} holds tensors, whose background is that of when they were precomputed: leave out "
            "data.background"
        )
    if run.pipeline is not None and run.pipeline.is_inpainting:
        raise TrainingError(
            f"{recipe.address}: an inpainting network learns from images, each masked anew each time; these are latents"
        )
    condition = {"label": torch.tensor(0)} if run.prompts is None else run.prompts.null
    require_fit(stream, run.shape, condition, run.made_with(recipe.classes))
    if stream.index.made_with is None and run.accelerator.is_main_process:
        tqdm.write(f"{recipe.address}: {UNCHECKED}")
    numbers = run.numbers_of(recipe.classes) if recipe.classes else None
    return StreamedTensors(stream, recipe.classes, numbers, run.constants)


def _masked(run: Run, latents: Data, images: Callable[[Tensor], Tensor]) -> Data:
    """The same data, with a mask in each row for an inpainting network. `images` gives those of items (B,)."""
    if run.pipeline is None or not run.pipeline.is_inpainting:
        return latents
    return InpaintingSet(latents, images, run.recipe.data.size, run.autoencoder())
