"""Small diffusers pipelines with random weights: Stable Diffusion, SDXL, inpainting, DiT, classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    PNDMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

WORDS = ("a", "red", "green", "blue", "yellow", "square", "circle")
TOKENS = 12
WIDTH = 16
SIZE = 32
LATENT = 16
CLASSES = 3


def tokenizer(folder: Path) -> CLIPTokenizer:
    """Whole words and single letters, with CLIP's marks; L = 12."""
    letters = ["!", *(chr(code) for code in range(ord("a"), ord("z") + 1))]
    pieces = letters + [f"{letter}</w>" for letter in letters]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append(f"{parts[0]} {parts[1]}")
            parts[:2] = ["".join(parts[:2])]
            pieces.append(parts[0])
    marks = ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: k for k, piece in enumerate([*dict.fromkeys(pieces), *marks])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges)]))
    return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)


def text_encoder(made: CLIPTokenizer, kind: Any = CLIPTextModel) -> Any:
    """A CLIP text model of two layers."""
    config = CLIPTextConfig(
        vocab_size=len(made), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=TOKENS, projection_dim=WIDTH,
        bos_token_id=made.bos_token_id, eos_token_id=made.eos_token_id, pad_token_id=made.pad_token_id,
    )  # fmt: skip
    return kind(config).eval()


def autoencoder() -> AutoencoderKL:
    """Four channels, a side halved once, and latents without a spread: the stock pipelines draw them at random."""
    made = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=SIZE, scaling_factor=0.7,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip
    with torch.no_grad():
        made.quant_conv.weight[4:] = 0
        made.quant_conv.bias[4:] = -30
    return made


def unet(in_channels: int = 4, **changes: Any) -> UNet2DConditionModel:
    """Two levels with cross-attention. What an inpainting network sees of the mask weighs more than the latent."""
    settings: dict[str, Any] = {
        "sample_size": LATENT, "in_channels": in_channels, "out_channels": 4, "block_out_channels": (8, 16),
        "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": WIDTH, "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    made = UNet2DConditionModel(**(settings | changes))
    with torch.no_grad():
        made.conv_in.weight[:, 4:] *= 4
    return made


def stable_diffusion(
    folder: Path, prediction: str = "epsilon", in_channels: int = 4, scheduler: Any = None, **changes: Any
) -> Path:
    """Stable Diffusion 1 (eps) or 2 (v), or with 9 channels its inpainting network."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    words = tokenizer(folder)
    kind = StableDiffusionInpaintPipeline if in_channels == 9 else StableDiffusionPipeline
    kind(
        vae=autoencoder(), text_encoder=text_encoder(words), tokenizer=words, unet=unet(in_channels, **changes),
        scheduler=scheduler or noise_scheduler(prediction), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def add_safety_checker(folder: Path, with_extractor: bool) -> None:
    """Give a pipeline a safety checker, with or without what makes its input of an image."""
    small = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config={**small, "image_size": SIZE, "patch_size": 16}, text_config=small)
    StableDiffusionSafetyChecker(config).save_pretrained(folder / "safety_checker")
    changes: dict[str, Any] = {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "requires_safety_checker": True,
    }
    if with_extractor:
        sides = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
        CLIPImageProcessor(**sides).save_pretrained(folder / "feature_extractor")
        changes["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | changes))


def noise_scheduler(prediction: str) -> PNDMScheduler:
    """As Stable Diffusion's checkpoints have it."""
    return PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1,
        prediction_type=prediction,
    )  # fmt: skip


def stable_diffusion_xl(folder: Path, first: Any = CLIPTextModel) -> Path:
    """SDXL: two text encoders, the second one padded with "!", pooled text and sizes."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    words = tokenizer(folder)
    second = CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS, pad_token="!")
    network = unet(
        cross_attention_dim=2 * WIDTH, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8,
    )  # fmt: skip
    StableDiffusionXLPipeline(
        vae=autoencoder(), text_encoder=text_encoder(words, first), tokenizer=words,
        text_encoder_2=text_encoder(words, CLIPTextModelWithProjection), tokenizer_2=second, unet=network,
        scheduler=noise_scheduler("epsilon"), add_watermarker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def dit(folder: Path) -> Path:
    """A class-conditional DiT in latents that gives a variance too, as facebook's does."""
    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=LATENT,
        patch_size=2, num_embeds_ada_norm=CLASSES,
    )  # fmt: skip
    scheduler = DDIMScheduler(clip_sample=False)
    DiTPipeline(network, autoencoder(), scheduler).save_pretrained(folder)
    return folder


def class_unet(folder: Path, classes: int | None = CLASSES + 1, prediction: str = "epsilon", seed: int = 0) -> Path:
    """A UNet2DModel in pixels: class-conditional with a null class, or without any."""
    torch.manual_seed(seed)
    network = UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, num_class_embeds=classes,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    DDPMPipeline(network, DDIMScheduler(prediction_type=prediction)).save_pretrained(folder)
    return folder
