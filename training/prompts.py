"""Captions -> condition arrays, by whichever encoder a teacher listens to; kept on disk, never encoded twice."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from training.errors import TrainingError
from training.guidance import Condition
from training.store import hash_of, to_disk

ROWS = 128


@dataclass(frozen=True)
class TextGraph:
    """A prompt encoder as a bundle has it: a module of (input_ids, attention_mask) and what makes these of a prompt.

    `tokens` are those of its encoder, or of both: of two the module takes (input_ids, attention_mask, input_ids_2), and
    gives `outputs`, all padded to `max_tokens`.
    """

    module: nn.Module
    max_tokens: int
    tokens: tuple[Tokens, ...]
    outputs: tuple[str, ...] = ("context",)


@dataclass(frozen=True)
class Tokens:
    """How an encoder reads prompts: the JSON of a tokenizers.Tokenizer, and the token that pads them."""

    tokenizer: str
    pad_id: int


class PromptEncoder(Protocol):
    """What makes conditions of captions."""

    @property
    def identity(self) -> str:
        """Names the encoder and all that its arrays depend on besides the captions."""
        ...

    @property
    def null(self) -> Condition:
        """The null condition of one row: arrays without a batch dimension, of the names that `encode` gives."""
        ...

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Arrays (N, *) on the CPU, one for each name, of N captions."""
        ...

    def too_long(self, captions: Sequence[str]) -> int:
        """How many of the captions lose their end."""
        ...

    def release(self) -> None:
        """Let go of the network until it is needed again."""
        ...

    def text_graph(self) -> TextGraph:
        """What a bundle needs of it."""
        ...


def encode_captions(encoder: PromptEncoder, captions: Sequence[str], cache: Path) -> Mapping[str, Tensor]:
    """Arrays (N, *) in float16 of the captions, memory-mapped from files under `cache`.

    The folder's name is a hash of the captions and the encoder's identity.
    """
    folder = cache / f"captions-{hash_of({'encoder': encoder.identity, 'captions': list(captions)})[:16]}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = cache / f".captions.{secrets.token_hex(4)}.partial"
        partial.mkdir()
        try:
            _write(encoder, captions, partial)
            to_disk(partial)
            encoder.release()
            try:
                partial.rename(folder)
            except OSError:
                if not folder.exists():  # else another process was faster
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    if lost := [name for name in encoder.null if not (folder / f"{name}.npy").exists()]:
        raise TrainingError(f"{folder} has lost its {', '.join(lost)}: remove it, and it is made again")
    return {name: torch.from_numpy(_mapped(folder / f"{name}.npy")) for name in encoder.null}


def _mapped(file: Path) -> NDArray[np.float16]:
    try:
        mapped: NDArray[np.float16] = np.load(file, mmap_mode="c")
    except ValueError as error:
        raise TrainingError(f"{file} cannot be read ({error}): remove {file.parent}, and it is made again") from error
    return mapped


def _write(encoder: PromptEncoder, captions: Sequence[str], folder: Path) -> None:
    tables: dict[str, np.memmap[tuple[int, ...], np.dtype[np.float16]]] = {}
    for start in tqdm(range(0, len(captions), ROWS), desc="encoding captions", unit="batch", disable=None):
        arrays = encoder.encode(captions[start : start + ROWS])
        for name, rows in arrays.items():
            if name not in tables:
                shape = (len(captions), *rows.shape[1:])
                tables[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float16, shape)
                _take_room(folder / f"{name}.npy")
            halves = rows.half()
            if not halves.isfinite().all():
                raise TrainingError(f"the text encoder's {name} of some caption is too large for 16 bits, or no number")
            tables[name][start : start + ROWS] = halves.numpy()
    for table in tables.values():
        table.flush()
    tell_of_cut(encoder.too_long(captions), len(captions))


def _take_room(file: Path) -> None:
    """Have a file all of its blocks: on a full disk, writing to one that is mapped and lacks some ends the process."""
    with file.open("r+b") as opened:
        try:
            os.posix_fallocate(opened.fileno(), 0, os.fstat(opened.fileno()).st_size)
        except OSError as error:
            error.filename = str(file)
            raise


def tell_of_cut(cut: int, count: int) -> None:
    """Tell of captions, of so many, that lose their end, if there are any."""
    if cut:
        tqdm.write(f"{cut} of {count} captions are too long for the text encoder: their ends are not seen")
