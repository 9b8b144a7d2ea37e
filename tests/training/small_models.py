"""Networks of random weights in the files that real ones come in: CLIP's folder, and FID's Inception."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

CLIP_TOKENS = 12


def write_clip(folder: Path, seed: int = 0) -> Path:
    """A CLIP of one layer a side that spells words letter by letter, as a transformers folder."""
    letters = string.ascii_lowercase
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    layer = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "pad_token_id": len(tokens) - 1}
    text = layer | ends | {"vocab_size": len(tokens), "max_position_embeddings": CLIP_TOKENS}
    vision = layer | {"image_size": 8, "patch_size": 4}
    torch.manual_seed(seed)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    images = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    model.save_pretrained(folder)
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def write_inception(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Random weights for torch-fidelity's Inception, of a size that carries a signal through all its layers."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with monkeypatch.context() as patch:
        # The class can only be built from a file of weights.
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.save({}, path)
        network = FeatureExtractorInceptionV3("random", ["2048"], str(path))
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), path)
    return path
