"""Reads a folder of captioned images: metadata.jsonl, caption files beside the images, or class folders."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from training.data.entries import (
    IMAGE_SUFFIXES,
    UNREAD_SUFFIXES,
    DataError,
    Entry,
    Record,
    Skipped,
    caption_lines,
    captions_of,
    fields_of,
    is_text,
)
from training.data.folder import METADATA


def read_imagefolder(folder: Path) -> Iterator[Entry | Skipped]:
    """Entries of a folder in a fixed order, and what had to be skipped.

    Lines of metadata.jsonl come first, in their order. Then, sorted by path, the images that no line
    names: captioned by a .txt file of the same name, or, where there is no metadata.jsonl, by the folder they
    lie in (`dog/1.png`, the usual layout of a class-labelled set), which also becomes their `class_name`.
    Hidden files and folders are passed over, and links are followed. Raises DataError for metadata in another form or
    place.
    """
    named = dict[str, bool]()  # by line, and whether one was good
    listed = (folder / METADATA).is_file()
    if not listed:
        _refuse_other_metadata(folder)
    else:
        for number, line in enumerate((folder / METADATA).read_bytes().split(b"\n"), 1):
            if line.strip():
                yield _listed(folder, f"{METADATA}:{number}", line, named)
    for path in sorted(p for p in _files(folder) if p.suffix.lower() in IMAGE_SUFFIXES + UNREAD_SUFFIXES):
        relative = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in relative.parts)
        if not hidden and relative.as_posix() not in named:
            yield _unlisted(folder, path, relative.as_posix(), by_folder=not listed)


def _files(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """All files in a folder and in those within; a link to a folder that it lies in leads nowhere."""
    real = folder.resolve()
    if real in above:
        return
    for path in folder.iterdir():
        if path.is_dir():
            yield from _files(path, above | {real})
        else:
            yield path


def _refuse_other_metadata(folder: Path) -> None:
    """Raise DataError where captions are said in a form, or at a place, that is not read: folders would be captions."""
    for path in sorted(filter(_is_metadata, _files(folder))):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            raise DataError(f"{path} is not read: put what it says into {folder / METADATA}, a JSON object a line")


def refuse_metadata_above(splits: Collection[Path], root: Path) -> None:
    """Raise DataError where metadata lie beside splits whose images would be captioned by their folders."""
    for path in sorted(filter(_is_metadata, root.iterdir())):
        for split in splits:
            if any(_is_captioned_by_folder(split, file) for file in _files(split)):
                raise DataError(f"{path} is not read: put what it says into {split / METADATA}, a JSON object a line")


def _is_captioned_by_folder(split: Path, file: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(split).parts)
    is_image = file.parent != split and file.suffix.lower() in IMAGE_SUFFIXES and not hidden
    return is_image and not (split / METADATA).is_file() and _caption_file(file) is None


def _is_metadata(path: Path) -> bool:
    named = path.stem == METADATA.partition(".")[0] and path.suffix in (".csv", ".jsonl", ".parquet")
    return named and not path.is_dir()


def _listed(folder: Path, place: str, line: bytes, named: dict[str, bool]) -> Entry | Skipped:
    try:
        metadata = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Skipped(place, f"not UTF-8: {error.reason} at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return Skipped(place, f"not JSON: {error}")
    if not isinstance(metadata, dict) or not isinstance(metadata.get("file_name"), str):
        return Skipped(place, 'no "file_name"')
    name = PurePosixPath(metadata.pop("file_name")).as_posix()  # so that ./1.png is 1.png
    where = f"{name} ({place})"
    try:
        path = inside(folder, name)
        if named.get(name):
            raise ValueError("duplicate file_name")
        named[name] = False
        texts = captions_of(metadata)
        if not path.is_file():
            return Skipped(where, "the file is missing")
        entry = _entry(path, name, texts, fields_of(metadata))
        named[name] = True
        return entry
    except (OSError, ValueError) as error:
        return Skipped(where, str(error))


def inside(folder: Path, name: str) -> Path:
    """The path of `name` in `folder`. Raises ValueError when it would lie outside, but by a link of its owner's."""
    relative = PurePosixPath(name)
    if not is_text(name):
        raise ValueError("file_name has half a surrogate pair")
    if "\x00" in name or name in ("", ".") or relative.is_absolute() or ".." in relative.parts or "\\" in name:
        raise ValueError("file_name must be a relative path inside the folder")
    return folder / relative


def _unlisted(folder: Path, path: Path, name: str, by_folder: bool) -> Entry | Skipped:
    if not is_text(name):
        return Skipped(ascii(name), "its name is not UTF-8")
    if not path.is_file():
        return Skipped(name, "a link to nothing" if path.is_symlink() else "not a file")
    if (beside := _caption_file(path)) is not None:
        try:
            return _entry(path, name, caption_lines(beside.read_bytes()), {})
        except (OSError, ValueError) as error:
            return Skipped(beside.relative_to(folder).as_posix(), str(error))
    if by_folder and path.parent != folder:
        label = path.parent.name
        words = " ".join(label.replace("_", " ").replace("-", " ").split())
        return _entry(path, name, (words or label,), {"class_name": label})
    return Skipped(name, f"no caption: not in {METADATA}, and no {path.with_suffix('.txt').name} beside it")


def _caption_file(image: Path) -> Path | None:
    """The file beside an image that has its captions, if there is one."""
    return next((file for suffix in (".txt", ".TXT") if (file := image.with_suffix(suffix)).is_file()), None)


def _entry(path: Path, name: str, texts: tuple[str, ...], fields: dict[str, Any]) -> Entry:
    return Entry(Record(name, texts, fields), path.read_bytes)
