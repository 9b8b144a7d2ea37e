"""The text side of a bundle: prompts to check its graph with, its tokenizers, and what the manifest says of them."""

from __future__ import annotations

from tokenizers import Tokenizer
from torch import Tensor

from engines.bundle import SecondTokens, TextEncoder
from engines.manifest import ATTENTION_MASK, IDS, SECOND_IDS
from training.exporting.graphs import Example
from training.prompts import TextGraph
from training.text import tokenize

TEXT = "text.onnx"
TOKENIZER, SECOND_TOKENIZER = "tokenizer.json", "tokenizer-2.json"
EXAMPLE_WORDS = ["a", "red", "apple", "icon", "with", "two", "green", "leaves", "on", "white"]


def text_example(text: TextGraph) -> Example:
    """Prompts of every length up to ten words, as a service sends them."""
    tokenizers = []
    for tokens in text.tokens:
        tokenizers.append(Tokenizer.from_str(tokens.tokenizer))
        tokenizers[-1].enable_padding(length=text.max_tokens, pad_id=tokens.pad_id)
        tokenizers[-1].enable_truncation(text.max_tokens)

    def make(batch: int) -> tuple[Tensor, ...]:
        prompts = [" ".join(EXAMPLE_WORDS[: i % (len(EXAMPLE_WORDS) + 1)]) for i in range(batch)]
        first, *second = (tokenize(tokenizer, prompts) for tokenizer in tokenizers)
        return (*first, *(ids for ids, _ in second))

    return Example(make, (IDS, ATTENTION_MASK, SECOND_IDS)[: 1 + len(tokenizers)], text.outputs)


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
