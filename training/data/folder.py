"""The imagefolder format that every set shares: <split>/metadata.jsonl beside PNG files, dataset.json."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

FORMAT_VERSION = 1
METADATA = "metadata.jsonl"

CARD = """---
configs:
- config_name: default
  data_files:
{data_files}
---

# {title}

Hugging Face `imagefolder`: each split is a folder of images beside a `metadata.jsonl`.
Sources, licences and counts are in `dataset.json`.
"""


class OutputExistsError(Exception):
    """The output folder exists and was not to be replaced."""


@contextmanager
def building(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block succeeds, so `out` is whole or absent.

    Raises OutputExistsError when `out` exists and is not empty, unless it is a set and to be overwritten.
    """
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not overwrite:
            raise OutputExistsError(f"{out} exists; choose another folder or pass --overwrite")
        if not _is_set(out):
            raise OutputExistsError(f"{out} is not an image set: it is not overwritten")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        replaced = out.parent / f".{out.name}.replaced"
        shutil.rmtree(replaced, ignore_errors=True)
        if out.exists():
            out.rename(replaced)
        partial.rename(out)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_set(folder: Path) -> bool:
    """Whether a folder is what this package writes: a set of images, or splits of shards and nothing else."""
    splits = _shown(folder)
    return (folder / "dataset.json").is_file() or (bool(splits) and all(map(_is_split_of_shards, splits)))


def _is_split_of_shards(folder: Path) -> bool:
    """Whether a folder holds shards of images, and the index of these if anything else."""
    names = {path.name for path in _shown(folder)}
    shards = {name for name in names if re.fullmatch(r"[0-9]{6}\.tar", name)}
    if not shards or names - shards - {"index.json"}:
        return False
    return "index.json" not in names or b'"tensors"' not in (folder / "index.json").read_bytes()


def _shown(folder: Path) -> list[Path]:
    """What is in a folder but for the hidden files of systems; nothing where it is none."""
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if not re.fullmatch(r"\.DS_Store|\._.*", path.name) or path.is_dir()]


class SplitWriter:
    """Writes the images of one split and, on `close`, its metadata.jsonl in the order written."""

    def __init__(self, root: Path, split: str) -> None:
        self.folder = root / split
        self.folder.mkdir(parents=True)
        self.lines: list[str] = []

    def write(self, file_name: str, image: Image.Image, record: Mapping[str, Any]) -> None:
        """Saves one PNG and remembers its metadata line."""
        image.save(self.folder / file_name, compress_level=6)
        self.lines.append(json.dumps({"file_name": file_name, **record}, ensure_ascii=False))

    def close(self) -> None:
        """Writes metadata.jsonl."""
        (self.folder / METADATA).write_text("".join(line + "\n" for line in self.lines), encoding="utf-8")


def write_description(root: Path, title: str, splits: tuple[str, ...], description: Mapping[str, Any]) -> None:
    """Writes dataset.json and the README.md that tells `datasets` where the splits lie."""
    text = json.dumps({"format_version": FORMAT_VERSION, **description}, indent=2, ensure_ascii=False)
    (root / "dataset.json").write_text(text + "\n", encoding="utf-8")
    data_files = "\n".join(f"  - split: {split}\n    path: {split}/**" for split in splits)
    (root / "README.md").write_text(CARD.format(title=title, data_files=data_files), encoding="utf-8")
