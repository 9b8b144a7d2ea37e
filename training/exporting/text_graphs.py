"""The text side of a bundle: prompts to check its graph with, its tokenizers, and what the manifest says of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

from engines.bundle import SecondTokens, TextEncoder
from engines.manifest import ATTENTION_MASK, IDS, SECOND_IDS
from training.exporting.graphs import Example, ExportError, named_outputs, worst_row
from training.prompts import PromptEncoder, TextGraph
from training.text import tokenize

TEXT = "text.onnx"
TOKENIZER, SECOND_TOKENIZER = "tokenizer.json", "tokenizer-2.json"
EXAMPLE_WORDS = ["a", "red", "apple", "icon", "with", "two", "green", "leaves", "on", "white"]
TRIED = ("", "a", "Two dogs!", "a photo of a red apple, on white")
TEXT_TOLERANCE = 1e-2
"""Between devices, of what is the same but for rounding."""


def text_example(text: TextGraph) -> Example:
    """Prompts of every length up to ten words, as a service sends them."""
    tokenizers = _tokenizers(text)

    def make(batch: int) -> tuple[Tensor, ...]:
        return _read(tokenizers, [" ".join(EXAMPLE_WORDS[: i % (len(EXAMPLE_WORDS) + 1)]) for i in range(batch)])

    return Example(make, (IDS, ATTENTION_MASK, SECOND_IDS)[: 1 + len(tokenizers)], text.outputs)


def checked_text_graph(prompts: PromptEncoder) -> TextGraph:
    """The text graph. Raises ExportError where a bundle would make other arrays of a prompt than the encoder does."""
    text = prompts.text_graph()
    tokenizers = _tokenizers(text)
    tried = [prompt for prompt in TRIED if not any(found.encode(prompt).overflowing for found in tokenizers)]
    encoded = prompts.encode(tried)
    prompts.release()
    with torch.inference_mode():
        made = named_outputs(text.module.eval(), _read(tokenizers, tried), text.outputs)
    for name, expected in encoded.items():
        if (error := worst_row(made[name], expected)) > TEXT_TOLERANCE:
            raise ExportError(
                f"a bundle would read prompts otherwise than the teacher does (relative error of {name}: {error:.2g}): "
                "run its students with diffusers"
            )
    return text


def _tokenizers(text: TextGraph) -> list[Tokenizer]:
    """The tokenizers as an engine uses them, but that they cut what is too long."""
    made = [Tokenizer.from_str(tokens.tokenizer) for tokens in text.tokens]
    for tokenizer, tokens in zip(made, text.tokens, strict=True):
        tokenizer.enable_padding(length=text.max_tokens, pad_id=tokens.pad_id)
        tokenizer.enable_truncation(text.max_tokens)
    return made


def _read(tokenizers: Sequence[Tokenizer], prompts: Sequence[str]) -> tuple[Tensor, ...]:
    """What the text graph is given of prompts."""
    first, *second = (tokenize(tokenizer, prompts) for tokenizer in tokenizers)
    return (*first, *(ids for ids, _ in second))


def tokenizer_files(text: TextGraph | None) -> dict[str, str]:
    """The tokenizers of a bundle, by file name: one where two encoders read alike."""
    tokenizers = dict.fromkeys(tokens.tokenizer for tokens in text.tokens) if text is not None else ()
    return dict(zip((TOKENIZER, SECOND_TOKENIZER), tokenizers, strict=False))


def text_encoder(text: TextGraph) -> TextEncoder:
    """The manifest's entry of the text graph."""
    names = {tokens: name for name, tokens in tokenizer_files(text).items()}
    first, *second = text.tokens
    return TextEncoder(
        graph=TEXT,
        tokenizer=names[first.tokenizer],
        max_tokens=text.max_tokens,
        pad_id=first.pad_id,
        second=SecondTokens(tokenizer=names[second[0].tokenizer], pad_id=second[0].pad_id) if second else None,
    )
