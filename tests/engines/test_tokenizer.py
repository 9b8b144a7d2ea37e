"""Tokenizer files that the library fails at, in whatever way it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engines.tokenizer import Tokenizer, TokenizerError, vocabulary_size

WORDS: dict[str, Any] = {"type": "WordLevel", "vocab": {"[PAD]": 0, "a": 1}, "unk_token": "[UNK]"}


def written(path: Path, **parts: Any) -> Path:
    plain = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    document = {"version": "1.0", "added_tokens": [], **plain, "model": WORDS, **parts}
    path.write_text(json.dumps(document))
    return path


def test_a_file_at_which_the_library_panics_is_an_error(tmp_path: Path) -> None:
    path = written(tmp_path / "tokenizer.json", normalizer={"type": "Precompiled", "precompiled_charsmap": ""})
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer(path, 8, 0)


def test_ids_go_as_far_as_the_largest_whichever_are_left_out(tmp_path: Path) -> None:
    path = written(tmp_path / "tokenizer.json", model={**WORDS, "vocab": {"[PAD]": 0, "a": 7}})
    assert vocabulary_size(path) == 8


def test_one_that_fails_at_unknown_words_does_not_open(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: it cannot read a prompt .*UNK"):
        Tokenizer(written(tmp_path / "tokenizer.json"), 8, 0)


def test_one_whose_marks_are_no_tokens_does_not_open(tmp_path: Path) -> None:
    template = [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    marks = {"type": "TemplateProcessing", "single": template, "pair": template, "special_tokens": {}}
    known = WORDS | {"vocab": {"[UNK]": 0, "a": 1}}
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: "):
        Tokenizer(written(tmp_path / "tokenizer.json", model=known, post_processor=marks), 8, 0)


def test_a_prompt_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    known = WORDS | {"vocab": {"[UNK]": 0, "a": 1}}
    tokenizer = Tokenizer(written(tmp_path / "tokenizer.json", model=known), 8, 0)
    assert tokenizer.ids("a") == [1]
    with pytest.raises(TokenizerError, match="not valid Unicode"):
        tokenizer.ids("\ud800")
