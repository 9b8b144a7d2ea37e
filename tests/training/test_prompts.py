"""Captions that are encoded: once, and whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from training.errors import TrainingError
from training.prompts import TextGraph, encode_captions


class Lengths:
    """A PromptEncoder that says how long captions are, until its disk is full."""

    def __init__(self) -> None:
        self.identity, self.null = "lengths", {"context": torch.zeros(1)}
        self.calls, self.full = 0, True

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        self.calls += 1
        if self.full and self.calls > 1:
            raise OSError("No space left on device")
        return {"context": torch.tensor([[float(len(caption))] for caption in captions])}

    def too_long(self, captions: Sequence[str]) -> int:
        return 0

    def release(self) -> None:
        pass

    def text_graph(self) -> TextGraph:
        raise ValueError("it has none")


def test_captions_are_encoded_once_and_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    encoder, captions = Lengths(), ["a" * (k % 7) for k in range(200)]
    for _ in range(2):
        encoder.calls = 0
        with pytest.raises(OSError, match="No space"):
            encode_captions(encoder, captions, tmp_path)
    assert not list(tmp_path.iterdir())
    encoder.full = False
    arrays = encode_captions(encoder, captions, tmp_path)
    assert arrays["context"].flatten().tolist() == [len(caption) for caption in captions]
    calls = encoder.calls
    encode_captions(encoder, captions, tmp_path)
    assert encoder.calls == calls


def test_a_disk_that_has_no_room_for_the_arrays_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before they are written to: by then it would be the end of the process."""

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left on device: .*context\.npy"):
        encode_captions(Lengths(), ["a"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_arrays_have_their_blocks_and_are_for_whom_the_umask_lets_read_them(tmp_path: Path) -> None:
    encoder = Lengths()
    encoder.full = False
    before = os.umask(0o022)
    try:
        encode_captions(encoder, ["a"] * 100_000, tmp_path)
    finally:
        os.umask(before)
    (file,) = tmp_path.glob("*/*.npy")
    assert file.stat().st_blocks * 512 >= file.stat().st_size
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o755


def test_an_array_that_is_damaged_is_named(tmp_path: Path) -> None:
    encoder = Lengths()
    encoder.full = False
    encode_captions(encoder, ["a"] * 10_000, tmp_path)
    (file,) = tmp_path.glob("*/*.npy")
    os.truncate(file, 5000)
    with pytest.raises(TrainingError, match=rf"{file} cannot be read .*: remove {file.parent}"):
        encode_captions(encoder, ["a"] * 10_000, tmp_path)


def test_an_array_that_is_gone_is_named(tmp_path: Path) -> None:
    encoder = Lengths()
    encoder.full = False
    encode_captions(encoder, ["a"], tmp_path)
    (file,) = tmp_path.glob("*/*.npy")
    file.unlink()
    with pytest.raises(TrainingError, match=rf"{file.parent} has lost its context: remove it"):
        encode_captions(encoder, ["a"], tmp_path)


def test_what_16_bits_cannot_hold_is_refused(tmp_path: Path) -> None:
    encoder = Lengths()
    encoder.full = False
    with pytest.raises(TrainingError, match="context of some caption is too large"):
        encode_captions(encoder, ["a" * 70_000], tmp_path)
    assert not list(tmp_path.iterdir())
