"""Prompts -> token ids of a fixed length. Knows a tokenizer.json; knows nothing of graphs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from numpy.typing import NDArray

from engines.manifest import ATTENTION_MASK, IDS, SECOND_IDS

# A prompt is read several times in a row: to check it, to check it again behind a queue, and to encode it.
_REMEMBERED = 64
# Words, and a character that hardly any vocabulary has: without a token for what is unknown, some fail at it.
_PROBE = "a red apple \U0010fffd"


class TokenizerError(Exception):
    """The tokenizer file cannot be read, or a prompt cannot be turned into tokens."""


class PromptSize(NamedTuple):
    """Tokens of a prompt with its end marks; those of its words; and those of them that are not the unknown token."""

    tokens: int
    words: int
    known: int


def vocabulary_size(path: Path) -> int:
    """How many ids, from 0 to the largest, the tokenizer.json at ``path`` may give; some may be no token's.

    Raises TokenizerError for a file that is none.
    """
    ids: dict[str, int] = _read_tokenizer(path).get_vocab()
    return max(ids.values(), default=-1) + 1


def _read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    with _failing_as(f"{path.name}: not a tokenizer"):
        return tokenizers.Tokenizer.from_file(str(path))


@contextmanager
def _failing_as(what: str) -> Iterator[None]:
    """Whatever the library raises as TokenizerError: bare Exception, and panics that are not an Exception at all."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise TokenizerError(f"{what} ({error})") from error


class Tokenizer:
    """A tokenizer.json with every prompt padded to ``max_tokens``; nothing is ever truncated silently."""

    def __init__(self, path: Path, max_tokens: int, pad_id: int, second: Tokenizer | None = None) -> None:
        """Read the file at ``path``. Raises TokenizerError, for a ``pad_id`` that is not a token of it too.

        ``second`` is that of a second text encoder, which sees the same prompts.
        """
        self._tokenizer = _read_tokenizer(path)
        if self._tokenizer.id_to_token(pad_id) is None:
            size = self._tokenizer.get_vocab_size()
            raise TokenizerError(f"{path.name}: none of its {size} tokens has the pad_id of the manifest, {pad_id}")
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._max_tokens = max_tokens
        self._pad_id = pad_id
        self._second = second
        self._encode = lru_cache(_REMEMBERED)(self._read)
        with _failing_as(f"{path.name}: it cannot read a prompt"):
            self._tokenizer.encode(_PROBE)

    def ids(self, prompt: str) -> list[int]:
        """Token ids of ``prompt`` with the special tokens. Raises TokenizerError where it cannot be read."""
        ids: list[int] = self._encode(prompt).ids
        return ids

    def measure(self, prompt: str) -> PromptSize:
        """How much of ``prompt`` the text encoder will see, and the most tokens that it is to one.

        Raises TokenizerError where it cannot be read.
        """
        encoding = self._encode(prompt)
        words = [token for token, mark in zip(encoding.tokens, encoding.special_tokens_mask, strict=True) if not mark]
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        most = max(len(encoding.ids), 0 if self._second is None else len(self._second.ids(prompt)))
        return PromptSize(most, len(words), sum(word != unknown for word in words))

    def _read(self, prompt: str) -> tokenizers.Encoding:
        with _failing_as("the tokenizer cannot read the prompt"):
            try:
                # One by one: encode_batch starts a thread pool, which forked workers do not survive.
                return self._tokenizer.encode(prompt)
            except (TypeError, UnicodeError) as error:
                raise TokenizerError("the prompt is not valid Unicode text") from error

    def inputs(self, prompts: Sequence[str]) -> dict[str, NDArray[np.int64]]:
        """The inputs of the text graph, each int64 (len(prompts), max_tokens): ids and attention mask.

        With a second tokenizer, its ids too. Raises TokenizerError as a call does.
        """
        ids, mask = self(prompts)
        second = {} if self._second is None else {SECOND_IDS: self._second(prompts)[0]}
        return {IDS: ids, ATTENTION_MASK: mask, **second}

    def __call__(self, prompts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids and attention mask, both int64 (len(prompts), max_tokens).

        Raises TokenizerError for a prompt of more tokens than that.
        """
        ids = np.full((len(prompts), self._max_tokens), self._pad_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            tokens = self.ids(prompt)
            if len(tokens) > self._max_tokens:
                raise TokenizerError(f"the prompt has {len(tokens)} tokens, at most {self._max_tokens} fit")
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        return ids, mask
