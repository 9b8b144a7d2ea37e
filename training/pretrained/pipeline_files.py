"""Which files of a pipeline's part are loaded: its folder may hold the weights in several formats and variants."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

STEMS = "(?:diffusion_pytorch_model|model|pytorch_model)"
SHARD = r"(?:-\d+-of-\d+)"
FORMATS = ("safetensors", "bin")  # diffusers and transformers take the first that is there
_OF_A_VARIANT = re.compile(rf"{STEMS}{SHARD}?\.([^.]+?){SHARD}?\.(?:{'|'.join(FORMATS)})")


def loaded_files(folder: Path, variant: str | None) -> list[Path]:
    """The config of a part and the weights that are loaded, sorted; all its files where none of them are weights.

    So a clone of a repository, which has every format, gives what a download of one of them does. A part without
    weights of the variant has its plain ones.
    """
    files = _files(folder)
    name = _name_of_those_loaded(files, variant)
    if name is None:
        return files
    return [file for file in files if file.name == "config.json" or name.fullmatch(file.name)]


def other_variants(folder: Path, variant: str | None) -> list[str]:
    """The variants that a part has weights of, sorted; none where it has plain ones, or those of `variant`."""
    files = _files(folder)
    if _name_of_those_loaded(files, variant) is not None:
        return []
    return sorted({found[1] for file in files if (found := _OF_A_VARIANT.fullmatch(file.name))})


def _files(folder: Path) -> list[Path]:
    """Those in the folder itself: what lies in folders of it, such as a backup, is never loaded."""
    return sorted(file for file in folder.glob("*") if file.is_file())


def _name_of_those_loaded(files: Sequence[Path], variant: str | None) -> re.Pattern[str] | None:
    for chosen in dict.fromkeys((variant, None)):
        for suffix in FORMATS:
            name = _name_of_weights(suffix, chosen)
            if any(name.fullmatch(file.name) for file in files):
                return name
    return None


def _name_of_weights(suffix: str, variant: str | None) -> re.Pattern[str]:
    """Whole, in numbered shards, which have the variant before or after the number, and the index of these."""
    of = rf"\.{re.escape(variant)}" if variant else ""
    return re.compile(rf"{STEMS}(?:(?:{of}{SHARD}?|{SHARD}{of})\.{suffix}|\.{suffix}(?:\.index{of}|{of}\.index)\.json)")
