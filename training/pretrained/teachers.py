"""Guided teachers that are there: diffusers pipelines, in folders or on a hub. What does not fit is refused.

Text: Stable Diffusion 1 and 2, SDXL, and their inpainting networks of 2 c + 1 channels. Classes: UNet2DModel and
UNet2DConditionModel, in pixels or latents, and DiT.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DiTTransformer2DModel
from tqdm import tqdm

from training.diffusion import Prediction, Schedule
from training.networks import NETWORKS, Network, NetworkDenoiser, never_drop, same_latents
from training.pretrained.pipeline_classes import TeacherClasses
from training.pretrained.pipeline_faults import TeacherError, first_line, network_faults
from training.pretrained.pipeline_files import loaded_files, other_variants
from training.pretrained.pipeline_prompts import PipelinePrompts, same_text
from training.pretrained.pipeline_schedules import prediction_of, schedule_of, unheeded
from training.store import hash_of, hash_of_files

Said = TypeVar("Said")

INDEX = "model_index.json"
# The last is what DiT was called before.
NETWORK_CLASSES: Mapping[str, type[Network]] = {**NETWORKS, "Transformer2DModel": DiTTransformer2DModel}


@dataclass(frozen=True)
class TeacherPipeline:
    """A diffusers pipeline in a folder.

    `index` is its model_index.json, `source` how it was named, `variant` that of its weights' files.
    """

    folder: Path
    index: Mapping[str, Any]
    source: str
    variant: str | None = None

    @classmethod
    def open(cls, source: str, revision: str | None = None, variant: str | None = None) -> TeacherPipeline:
        """A folder, or else a name on the hub, which is fetched. Raises TeacherError if it cannot be a teacher.

        Tells of what its scheduler does that no student learns.
        """
        folder = Path(source)
        if revision is not None and folder.is_dir():
            raise TeacherError(f"{source} is a folder, which has no revision {revision!r}: that is of a name on a hub")
        try:
            if not folder.is_dir():
                folder = Path(diffusers.DiffusionPipeline.download(source, revision=revision, variant=variant))
            index = json.loads((folder / INDEX).read_text())
            if not isinstance(index, dict):
                raise ValueError(f"{INDEX} is not a JSON object")
        except (OSError, ValueError) as error:
            raise TeacherError(f"{source} is not a diffusers pipeline: {first_line(error)}") from error
        opened = cls(folder, index, source, variant)
        try:
            opened._check()
        except TeacherError:
            raise
        except Exception as error:  # whatever odd settings make it raise
            raise TeacherError(f"{source}: a setting is missing or faulty: {first_line(error)}") from error
        for setting in unheeded(opened._scheduler):
            tqdm.write(f"{source}: its scheduler's {setting} is not heeded: students learn the sampler without it")
        return opened

    def _check(self) -> None:
        """Raise TeacherError for what cannot be distilled, before any weights are read."""
        config = self.network_config
        for wrong, reason in network_faults(config, self.is_text, self.part):
            if wrong:
                raise TeacherError(f"{self.folder}: {reason}")
        if (vae := self.autoencoder_class) not in (None, "AutoencoderKL"):
            raise TeacherError(f"{self.folder}: its autoencoder is a {vae}, not an AutoencoderKL")
        if quantised := [part for part in ("vqvae", "movq") if self._class_of(part)]:
            raise TeacherError(f"{self.folder}: its autoencoder is a {quantised[0]}, not an AutoencoderKL")
        if self.autoencoder_class is not None:
            config = self._config("vae/config.json")
            if config["latent_channels"] != self.channels:
                raise TeacherError(
                    f"{self.folder}: its autoencoder has {config['latent_channels']} channels, its network "
                    f"{self.channels}"
                )
            if colours := {config.get(end, 3) for end in ("in_channels", "out_channels")} - {3}:
                raise TeacherError(f"{self.folder}: its autoencoder is of {colours.pop()} colours, not of 3")
            if odd := [name for name in ("latents_mean", "latents_std", "shift_factor") if config.get(name)]:
                raise TeacherError(f"{self.folder}: an autoencoder with {odd[0]} is not known")
        if self.is_text and self.autoencoder_class is None:
            raise TeacherError(f"{self.folder}: a text-to-image pipeline without an autoencoder is not known")
        if self.variant and not any(self._has_variant(part) for part in self.index if self._class_of(part)):
            raise TeacherError(f"{self.folder} has no weights of the variant {self.variant!r}")
        for part in (self.part, "vae", *self._text_parts, "safety_checker", "image_encoder"):
            if self._class_of(part) and (there := other_variants(self.folder / part, self.variant)):
                only = f"its {part} has weights of the variant {' or '.join(there)} only"
                raise TeacherError(f"{self.folder}: {only}: name it as variant")
        self._check_pooled()
        self._check_text_width()
        _ = self.schedule, self.prediction, self.unit, self.only_side
        classes = self.classes
        if classes.count and (unknown := classes.unknown):
            raise TeacherError(f"{self.folder}: id2label names class {unknown[0]}, and its network has {classes.count}")

    def _class_of(self, part: str) -> str | None:
        """The class of one of the pipeline's parts; None if it has none."""
        entry = self.index.get(part)
        return entry[1] if isinstance(entry, (list, tuple)) else None

    @property
    def has_safety_checker(self) -> bool:
        """Whether it looks at its images for what is not safe."""
        return self._class_of("safety_checker") is not None

    @property
    def is_text(self) -> bool:
        """Whether prompts are its condition; else classes are."""
        return self._class_of("text_encoder") is not None or self._class_of("text_encoder_2") is not None

    @cached_property
    def part(self) -> str:
        """The subfolder of the network."""
        for part in ("unet", "transformer"):
            if self._class_of(part) in NETWORK_CLASSES:
                return part
        found = self._class_of("unet") or self._class_of("transformer") or "none"
        raise TeacherError(f"{self.folder}: its network is {found}; known are {', '.join(NETWORK_CLASSES)}")

    @cached_property
    def network_config(self) -> dict[str, Any]:
        """The network's config.json."""
        return self._config(f"{self.part}/config.json")

    @cached_property
    def _scheduler(self) -> dict[str, Any]:
        return self._config("scheduler/scheduler_config.json")

    def _config(self, name: str) -> dict[str, Any]:
        try:
            config: dict[str, Any] = json.loads((self.folder / name).read_text())
        except (OSError, ValueError) as error:
            raise TeacherError(f"{self.folder}/{name}: {first_line(error)}") from error
        return config

    @cached_property
    def schedule(self) -> Schedule:
        """What its scheduler's noise says."""
        return self._said(schedule_of)

    @cached_property
    def prediction(self) -> Prediction:
        """What its network predicts."""
        return self._said(prediction_of)

    def _said(self, of: Callable[[Mapping[str, Any]], Said]) -> Said:
        """What the scheduler's config says."""
        try:
            return of(self._scheduler)
        except ValueError as error:
            raise TeacherError(f"{self.folder}: {error}") from error

    @property
    def autoencoder_class(self) -> str | None:
        """The class of the autoencoder; None in pixel space."""
        return self._class_of("vae")

    @cached_property
    def autoencoder_halvings(self) -> int:
        """How often the autoencoder halves an image's side."""
        if self.autoencoder_class is None:
            return 0
        return len(self._config("vae/config.json")["block_out_channels"]) - 1

    def check_side(self, side: int) -> None:
        """Raise TeacherError if images of that side do not pass the autoencoder and the network."""
        if side % self.unit:
            raise TeacherError(f"{self.folder} takes images whose side is a multiple of {self.unit}, not {side}")
        if self.only_side not in (None, side):
            raise TeacherError(f"{self.folder} takes images of side {self.only_side}, not {side}")

    @property
    def unit(self) -> int:
        """What the side of an image must be a multiple of."""
        config = self.network_config
        if self.part == "transformer":
            return int(config["patch_size"]) << self.autoencoder_halvings
        return 1 << (len(config["block_out_channels"]) - 1 + self.autoencoder_halvings)

    @property
    def only_side(self) -> int | None:
        """The one side of an image that a transformer takes."""
        if self.part != "transformer":
            return None
        return int(self.network_config["sample_size"]) << self.autoencoder_halvings

    @cached_property
    def channels(self) -> int:
        """c, the channels of z."""
        config = self.network_config
        return int(config["out_channels"] if self.is_text else config["in_channels"])

    @property
    def is_inpainting(self) -> bool:
        """Whether the network sees a mask and a masked image beside z."""
        return self.is_text and self.network_config["in_channels"] == 2 * self.channels + 1

    def _check_pooled(self) -> None:
        """Raise TeacherError for a network that is told other things beside the prompt than SDXL is: its refiner."""
        config = self.network_config
        if not self.is_xl:
            return
        width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        # Stock pipelines pool by the first that projects, and expect the width of the second.
        projects = str(self._class_of("text_encoder")).endswith("WithProjection")
        pooling = self._text_parts if projects else ("text_encoder_2",)
        pooled = {self._config(f"{part}/config.json").get("projection_dim", 0) for part in pooling}
        if self._class_of("text_encoder") is None or pooled != {width}:
            raise TeacherError(f"{self.folder}: it is told other things than SDXL's base is (a refiner?)")

    def _check_text_width(self) -> None:
        """Raise TeacherError for text encoders whose context the network does not attend to."""
        if not self.is_text:
            return
        configs = [self._config(f"{part}/config.json") for part in self._text_parts]
        given = sum(config.get("hidden_size") or config["d_model"] for config in configs)
        taken = self.network_config.get("encoder_hid_dim") or self.network_config.get("cross_attention_dim", given)
        if unfit := [width for width in (taken if isinstance(taken, list) else [taken]) if width != given]:
            raise TeacherError(
                f"{self.folder}: its network attends to a context of width {unfit[0]}, and its text encoders give one "
                f"of {given}"
            )

    @property
    def _text_parts(self) -> tuple[str, ...]:
        """The subfolders of the text encoders that are used."""
        return ("text_encoder", "text_encoder_2") if self.is_xl else ("text_encoder",)

    @property
    def is_xl(self) -> bool:
        """Whether the network is told pooled text and the image's size, as SDXL is."""
        return self.network_config.get("addition_embed_type") == "text_time"

    def denoiser(self) -> NetworkDenoiser:
        """The network as a frozen Denoiser that gives v. Raises TeacherError where its weights are not whole."""
        kind = NETWORK_CLASSES[str(self._class_of(self.part))]
        network = self._load(kind, self.part)
        never_drop(network)
        return NetworkDenoiser(network, self.schedule, self.prediction).eval().requires_grad_(False)

    def autoencoder(self) -> AutoencoderKL | None:
        """The autoencoder of a pipeline in latent space."""
        return None if self.autoencoder_class is None else self._load(AutoencoderKL, "vae")

    def _load(self, kind: Any, part: str) -> Any:
        try:
            loaded, found = kind.from_pretrained(
                str(self.folder), subfolder=part, variant=self.variant if self._has_variant(part) else None,
                local_files_only=True, output_loading_info=True,
            )  # fmt: skip
        except Exception as error:  # whatever torn files make the libraries raise
            raise TeacherError(f"{self.folder}/{part}: {first_line(error)}") from error
        missing = {name for name, value in loaded.state_dict().items() if value.is_meta}
        missing |= {name for name, _ in loaded.named_parameters()} & set(found["missing_keys"])
        if missing:
            raise TeacherError(f"{self.folder}/{part}: its weights lack {min(missing)}")
        # Of a text encoder the last layers may be left out on purpose.
        if part in (self.part, "vae") and (unexpected := found["unexpected_keys"]):
            raise TeacherError(f"{self.folder}/{part}: its config has no place for its weights {min(unexpected)}")
        return loaded if loaded.dtype == torch.float32 else loaded.float()

    def _has_variant(self, part: str) -> bool:
        """Whether there are weights of the variant that was asked for."""
        return bool(self.variant) and any(f".{self.variant}" in file.name for file in self.files(part))

    def prompts(self, device: torch.device) -> PipelinePrompts:
        """Its text encoders. What they are used for raises TeacherError where they are not whole, or do not fit."""
        # Looked up here: the pipelines take seconds to import, and most runs need none.
        kind = diffusers.StableDiffusionXLPipeline if self.is_xl else diffusers.StableDiffusionPipeline
        bare = {"unet": None, "vae": None, "image_encoder": None, "feature_extractor": None}
        if not self.is_xl:
            bare |= {"safety_checker": None}

        def load() -> Any:
            encoders = {part: self._text_encoder(part) for part in self._text_parts}
            try:
                pipeline = kind.from_pretrained(str(self.folder), **bare, **encoders, local_files_only=True)
                return pipeline.to(device, torch.float32)
            except Exception as error:  # whatever torn files make the libraries raise
                raise TeacherError(f"{self.folder}: its text encoders cannot be read: {first_line(error)}") from error

        parts = [part for part in self.index if part.startswith(("text_encoder", "tokenizer"))]
        identity = hash_of_files([file for part in parts for file in self.files(part)])
        if self._unlike_others:
            identity = hash_of({"files": identity, **self._unlike_others})
        return PipelinePrompts(self.folder, identity, load)

    def _text_encoder(self, part: str) -> Any:
        kind = getattr(transformers, str(self._class_of(part)), None)
        if kind is None:
            raise TeacherError(f"{self.folder}: its {part} is a {self._class_of(part)}, which transformers lacks")
        return self._load(kind, part)

    @cached_property
    def identity(self) -> str:
        """Names all that its predictions depend on: network, scheduler, autoencoder, and which weights of them."""
        parts = [self.part, "scheduler", *(["vae"] if self.autoencoder_class is not None else [])]
        files = [hash_of_files(self.files(part)) for part in parts]
        return hash_of({"files": files, "variant": self.variant, **self._unlike_others})

    @property
    def _unlike_others(self) -> dict[str, bool]:
        """What is said beside the parts of how the null condition is made, where that is not the usual way."""
        name = "force_zeros_for_empty_prompt"
        return {name: False} if self.is_xl and not self.index.get(name, True) else {}

    def check_pair(self, second: TeacherPipeline) -> None:
        """Raise TeacherError for a second pipeline whose network cannot predict beside this one's."""
        ours, theirs = self._calling, second._calling
        if unlike := [name for name in ours if ours[name] != theirs.get(name)]:
            name = unlike[0]
            raise TeacherError(f"{name} differs: {ours[name]} in {self.folder}, {theirs[name]} in {second.folder}")
        if not same_latents(self.autoencoder(), second.autoencoder()):
            raise TeacherError(f"{self.folder} and {second.folder} have different autoencoders")
        if self.is_text and not same_text(*(one.prompts(torch.device("cpu")) for one in (self, second))):
            raise TeacherError(f"{self.folder} and {second.folder} have different text encoders")

    @property
    def _calling(self) -> dict[str, Any]:
        """How its network is called, less its classes, which a second one may lack."""
        text = ("in_channels", "cross_attention_dim", "addition_embed_type", "projection_class_embeddings_input_dim")
        called = {name: self.network_config.get(name) for name in text} if self.is_text else {}
        return {"condition": "prompts" if self.is_text else "classes", "channels": self.channels} | called

    def files(self, part: str) -> list[Path]:
        """The files of a part that are loaded, sorted; none if the pipeline lacks it."""
        return loaded_files(self.folder / part, self.variant)

    @cached_property
    def classes(self) -> TeacherClasses:
        """The classes that its network can be given; none where it is conditioned on text alone."""
        config = self.network_config
        if self.part == "transformer":
            count = int(config.get("num_embeds_ada_norm", 1000)) + 1
        else:
            count = int(config.get("num_class_embeds") or 0)
        return TeacherClasses(self.folder, count, self.index.get("id2label") or {})
