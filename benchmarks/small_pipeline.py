"""A small Stable Diffusion with random weights, and shards of images with captions for it. For speed, not for looks."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training.data.entries import Record
from training.data.shard_index import make_index
from training.data.shards import ShardWriter

SIZE = 128
TOKENS = 77
WIDTH = 128
MARKS = ("<|startoftext|>", "<|endoftext|>")
COLOURS = ("red", "green", "blue", "yellow")


def make_checkpoint(folder: Path) -> Path:
    """A U-Net of 15 M parameters on latents of 16 x 16, whose autoencoder encodes in about the time of one call."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    tokenizer = _tokenizer(folder)
    StableDiffusionPipeline(
        vae=_autoencoder(), text_encoder=_text_encoder(tokenizer), tokenizer=tokenizer, unet=_unet(),
        scheduler=PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def _tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's, with every letter a token."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *MARKS]
    (folder / "vocab.json").write_text(json.dumps({piece: k for k, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)


def _text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=TOKENS, projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return CLIPTextModel(config).eval()


def _autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 32, 64, 64), norm_num_groups=16, latent_channels=4, sample_size=SIZE,
        scaling_factor=0.18215,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).eval()  # fmt: skip


def _unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE // 8, block_out_channels=(96, 160, 256), layers_per_block=1, norm_num_groups=16,
        cross_attention_dim=WIDTH, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def write_images(folder: Path, images: int, per_shard: int, size: int) -> Path:
    """Indexed WebDataset shards of PNGs: a colour with noise on it, and its name as the caption."""
    noise = np.random.default_rng(0)
    with ShardWriter(folder, per_shard) as writer:
        for number in range(images):
            name = COLOURS[number % len(COLOURS)]
            pixels = np.asarray(Image.new("RGB", (size, size), name), np.int64)
            pixels = (pixels + noise.normal(0, 20, pixels.shape)).clip(0, 255).astype(np.uint8)
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "PNG")
            writer.write(Record(f"{number}.png", (f"a {name} square", name), {}), png.getvalue())
    make_index(str(folder))
    return folder
