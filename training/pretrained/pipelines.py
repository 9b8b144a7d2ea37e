"""Students as diffusers pipelines: what stock StableDiffusionPipeline, Img2Img and Inpaint, or SDXL's, run as they are.

Guidance is an input of the network, so the stock pipelines call it once a step, and their `guidance_scale` is 1 + w.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
from diffusers import AutoencoderKL, UNet2DConditionModel

from training.autoencoder import AUTOENCODER_WEIGHTS
from training.diffusion import stock_scheduler
from training.networks import NetworkDenoiser, save_network
from training.pretrained.pipeline_files import SHARD
from training.pretrained.teachers import INDEX, TeacherPipeline
from training.recipe import Recipe
from training.sections import OwnPrediction, TeacherRecipe
from training.stages import AUTOENCODER
from training.store import link, readable, to_disk, whole_file
from training.text import save_text_parts

ABSENT = [None, None]
CONFIG = "config.json"


def save_stage(
    folder: Path,
    part: str,
    network: NetworkDenoiser | AutoencoderKL,
    pipeline: TeacherPipeline | None,
    max_tokens: int,
) -> None:
    """Write a stage's network into its folder, whole or not at all. Raises OSError or SafetensorError.

    `max_tokens` are those of a prompt for networks trained from scratch.
    """
    partial = folder / f"{part}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    if isinstance(network, NetworkDenoiser):
        save_network(network, partial)
        readable(partial)
        save_pipeline(folder, network, pipeline, max_tokens)
        to_disk(folder)
        partial.rename(folder / part)
        to_disk(folder)
        return
    network.save_pretrained(partial)
    readable(partial)
    to_disk(partial)
    for file in sorted(partial.iterdir(), key=lambda file: file.name == AUTOENCODER_WEIGHTS):
        file.replace(folder / file.name)
    partial.rmdir()


def save_pipeline(folder: Path, denoiser: NetworkDenoiser, pipeline: TeacherPipeline | None, max_tokens: int) -> None:
    """Write into `folder` what a pipeline has besides the network: scheduler, index and the teacher's other parts.

    Weights are hard links where the disk allows it: those of a checkpoint, or the run's own autoencoder and MiniLM
    (`max_tokens` of a prompt). Configs that state a precision are written anew. Parts that the
    stock pipeline lacks are left out. Networks that no stock pipeline can give w to (classes) get the scheduler alone.
    """
    prediction: OwnPrediction = "x" if denoiser.prediction == "x" else "v"
    stock_scheduler(denoiser.schedule, prediction).save_pretrained(folder / "scheduler")
    if not has_pipeline(denoiser):
        return
    index = _of_teacher(folder, pipeline) if pipeline is not None else _of_scratch(folder, max_tokens)
    index |= {
        "_diffusers_version": diffusers.__version__,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    with whole_file(folder / INDEX) as partial:
        partial.write_text(json.dumps(index, indent=2))


def has_pipeline(denoiser: NetworkDenoiser) -> bool:
    """Whether there is a stock pipeline that gives a student of this network its w."""
    network = denoiser.network
    return isinstance(network, UNet2DConditionModel) and not network.config["num_class_embeds"]


def student_card(recipe: Recipe, steps: int, timesteps: int, has_pipeline: bool) -> str:
    """The README of a student's folder."""
    low, high = recipe.guidance
    from_scratch = isinstance(recipe.teacher, TeacherRecipe)
    exact = (
        "takes exactly the steps that it was trained for"
        if timesteps % steps == 0
        else f"takes its {steps} steps only roughly, since they do not divide {timesteps} timesteps"
    )
    scale = f"a `guidance_scale` of {1 + low:g} to {1 + high:g}"
    in_diffusers = (
        f"Run it with `num_inference_steps={steps}` and {scale}: guidance is an input\nof the network, which is called "
        f"once a step, and a negative prompt has no effect.{_how_to_load(recipe) if from_scratch else ''}"
    )
    if not from_scratch:
        in_diffusers += (
            " To inpaint, give it\n`strength=1.0`: StableDiffusionXLInpaintPipeline leaves out a step by default."
        )
    in_bundles = (
        "No stock pipeline of diffusers gives its network the guidance weight: this folder has the network and its\n"
        "scheduler. `fewstep export` makes a bundle of it, which `fewstep generate` and `fewstep serve` run\n"
        f"with {scale}."
    )
    return f"""---
license: {json.dumps(recipe.export.licence.lower())}
library_name: diffusers
---
# {recipe.export.title or recipe.name}: a student of {steps} step{"s" if steps > 1 else ""}

Distilled by fewstep (Meng et al., On Distillation of Guided Diffusion Models, CVPR 2023) from the recipe {recipe.name}.

{in_diffusers if has_pipeline else in_bundles} The stock scheduler in this
folder {exact}.
"""


def _how_to_load(recipe: Recipe) -> str:
    """What the pipeline of a student trained from scratch must be told."""
    in_pixels = recipe.autoencoder is None and recipe.data.autoencoder is None
    vae = (
        ' It works on pixels and has no\nVAE: load it with `vae=None` too, and give it `output_type="latent"`.'
        if in_pixels
        else ""
    )
    return (
        " Its text encoder has its code in\nits folder, which is read by "
        f"`from_pretrained(FOLDER, trust_remote_code=True)`.{vae}"
    )


def _of_teacher(folder: Path, pipeline: TeacherPipeline) -> dict[str, Any]:
    kind = _stock_pipeline(pipeline)
    index = {name: pipeline.index[name] for name in signature(kind).parameters if name in pipeline.index}
    named = {name for name, entry in index.items() if isinstance(entry, (list, tuple)) and entry[0] is not None}
    files = {part: found for part in named - {"unet", "scheduler"} if (found := pipeline.files(part))}
    if "feature_extractor" not in files:
        files.pop("safety_checker", None)  # Stock pipelines load none without it.
    for part, found in files.items():
        _link(found, folder / part, pipeline.variant)
        if index[part][0] != "diffusers":
            _state_precision(folder / part / CONFIG)
    # Such as a safety checker that was left out of a download.
    index |= dict.fromkeys(named - {"unet", "scheduler", *files}, ABSENT)
    if index.get("safety_checker") == ABSENT:
        index["requires_safety_checker"] = False
    return {"_class_name": kind.__name__, **index}


def _stock_pipeline(teacher: TeacherPipeline) -> Any:
    """The class of diffusers that runs the student, whatever the teacher's own is."""
    # Looked up here: the pipelines take seconds to import.
    if teacher.is_inpainting:
        return diffusers.StableDiffusionXLInpaintPipeline if teacher.is_xl else diffusers.StableDiffusionInpaintPipeline
    return diffusers.StableDiffusionXLPipeline if teacher.is_xl else diffusers.StableDiffusionPipeline


def _state_precision(config: Path) -> None:
    """Have a model of transformers, which loads in the precision that its config states, load in the network's."""
    if not config.exists():
        return
    settings = {name: value for name, value in json.loads(config.read_text()).items() if name != "torch_dtype"}
    config.write_text(json.dumps(settings | {"dtype": "float32"}, indent=2))


def _of_scratch(folder: Path, max_tokens: int) -> dict[str, Any]:
    autoencoder = folder.parent / AUTOENCODER
    if autoencoder.is_dir():
        _link([autoencoder / CONFIG, *autoencoder.glob("*.safetensors")], folder / "vae", None)
    return {
        "_class_name": "StableDiffusionPipeline",
        "vae": ["diffusers", "AutoencoderKL"] if autoencoder.is_dir() else ABSENT,
        **save_text_parts(folder, max_tokens),
        "safety_checker": ABSENT,
        "feature_extractor": ABSENT,
        "image_encoder": ABSENT,
        "requires_safety_checker": False,
    }


def _link(files: Sequence[Path], target: Path, variant: str | None) -> None:
    """Files in another folder, those of a variant by their plain names. Shards keep the names that their index has.

    Weights are links; the rest is copied, as who saves a pipeline in its folder writes into its files.
    """
    target.mkdir(exist_ok=True)
    for file in files:
        plain = file.name if re.search(SHARD, file.name) else file.name.replace(f".{variant}.", ".")
        place = link if file.suffix == ".safetensors" else shutil.copyfile
        place(file, target / plain)
