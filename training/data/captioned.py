"""The map-style dataset of captioned images that training and evaluation read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from training.data.entries import IMAGE_SUFFIXES, DataError, Entry, Record, Skipped
from training.data.folder import METADATA
from training.data.imagefolder import read_imagefolder, refuse_metadata_above
from training.data.pixels import Colour, Fit, composite, decode, fit_square
from training.data.shards import read_shards, shard_paths

SPLITS = ("train", "heldout", "validation", "valid", "val", "test", "eval")
ALIASES = {"training": "train", "testing": "test", "evaluation": "eval"}
WHITE: Colour = (255, 255, 255)
# Fitted images are kept in memory up to this many bytes; a larger set is decoded again at each access.
CACHE_BYTES = 1 << 30


class CaptionedImages:
    """Captioned images of one size. Everything in it decoded once without fault; the rest is in `skipped`.

    Attributes:
        records: name, captions and other metadata of each image, in a fixed order.
        skipped: what was left out, and why.
    """

    def __init__(
        self,
        records: Sequence[Record],
        skipped: Sequence[Skipped],
        read: Callable[[int], NDArray[np.uint8]],
    ) -> None:
        self.records = tuple(records)
        self.skipped = tuple(skipped)
        self._read = read

    @classmethod
    def open(
        cls,
        path: Path | str,
        split: str = "train",
        size: int = 32,
        background: Colour = WHITE,
        groups: Collection[str] | None = None,
        fit: Fit = "pad",
    ) -> CaptionedImages:
        """Opens one split of a set: an imagefolder, or a folder of WebDataset shards.

        Args:
            path: the set; its split is the folder of that name in it, and a folder without splits is "train".
            split: name of the split.
            size: side in pixels; other images are resized.
            background: colour under transparent pixels and padding.
            groups: keep only records whose `group` or `subgroup` is one of these.
            fit: whether images that are not square are padded or cropped.

        Raises DataError when the split does not exist, a group is unknown, or nothing is left.
        """
        folder = split_folder(Path(path), split)
        entries: list[Entry] = []
        skipped: list[Skipped] = []
        for found in read_entries(folder):
            if isinstance(found, Skipped):
                skipped.append(found)
            else:
                entries.append(found)
        if groups is not None:
            entries = _of_groups(entries, groups, folder, splits_of(Path(path)).values())
        return cls._decoded(entries, skipped, size, background, fit, folder)

    @classmethod
    def _decoded(
        cls, entries: Sequence[Entry], skipped: list[Skipped], size: int, background: Colour, fit: Fit, folder: Path
    ) -> CaptionedImages:
        keep_all = len(entries) * size * size * 3 <= CACHE_BYTES
        good: list[Entry] = []
        pixels: list[NDArray[np.uint8]] = []
        for entry in tqdm(entries, desc=f"reading {folder.name}", unit="image", disable=None, leave=False):
            try:
                array = _fitted(entry, size, background, fit)
            except (OSError, ValueError) as error:
                skipped.append(Skipped(entry.record.file_name, str(error)))
                continue
            good.append(entry)
            if keep_all:
                pixels.append(array)
        if not good:
            raise DataError(f"{folder} holds no usable captioned image{_examples(skipped)}")
        read = pixels.__getitem__ if keep_all else lambda i: _fitted(good[i], size, background, fit)
        return cls([entry.record for entry in good], skipped, read)

    def __len__(self) -> int:
        return len(self.records)

    def image(self, i: int) -> NDArray[np.uint8]:
        """Image i over the background: uint8 (size, size, 3)."""
        return self._read(i)

    def pixels(self) -> NDArray[np.uint8]:
        """All images over the background: uint8 (images, size, size, 3)."""
        return np.stack([self.image(i) for i in range(len(self))])

    def texts(self, i: int) -> tuple[str, ...]:
        """Captions of image i, at least one."""
        return self.records[i].texts

    @property
    def classes(self) -> tuple[str, ...]:
        """Sorted class names: `class_name` of the records, or their `group` where they have none."""
        return tuple(sorted({_class_of(record) for record in self.records}))

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class of every image as its place in `classes`, shape (images,)."""
        return self.labels_in(self.classes)

    def labels_in(self, classes: Sequence[str]) -> NDArray[np.int64]:
        """Class of every image as its place in `classes`, such as those of another split, shape (images,).

        Raises DataError when a record has no class, or one that is not among them.
        """
        index = {name: k for k, name in enumerate(classes)}
        names = [_class_of(record) for record in self.records]
        unknown = sorted(set(names) - set(index))
        if unknown:
            raise DataError(f"unknown classes: {', '.join(unknown)}")
        return np.array([index[name] for name in names], np.int64)


def read_entries(folder: Path) -> Iterable[Entry | Skipped]:
    """Entries of one split's folder, whichever of the formats it has. Raises DataError where it has both."""
    if shards := shard_paths(folder):
        if (folder / METADATA).is_file():
            raise DataError(
                f"{folder} has both {METADATA} and shards, such as {shards[0].name}: leave one of them there"
            )
        return read_shards(folder)
    return read_imagefolder(folder)


def splits_of(path: Path) -> dict[str, Path]:
    """Folder of each split of a set. Raises DataError when `path` is not a folder.

    Splits are folders with a usual name, or with metadata or shards in them. A folder that has metadata
    or shards itself, or no such folder in it, is one split: "train". Beside the folder of a class, one that
    looks like it is a class too, whatever its name.
    """
    if not path.is_dir():
        raise DataError(f"{path} is not a folder")
    if _is_split(path):
        return {"train": path}
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    names = {folder: _split_name(folder.name) for folder in folders}
    splits = {names[folder]: folder for folder in folders if _is_split(folder)}
    usual = {names[folder]: folder for folder in folders if names[folder] in SPLITS}
    likely = [folder for folder in folders if _is_split(folder) or names[folder] in SPLITS]
    if twice := [folder for folder in likely if {**usual, **splits}[names[folder]] != folder]:
        raise DataError(f"{path} has two folders for the split {names[twice[0]]!r}")
    others = [folder for folder in folders if folder not in likely]
    if any(map(_is_class, others)):
        usual = {name: folder for name, folder in usual.items() if not _is_class(folder)}
    if found := dict(sorted({**splits, **usual}.items())):
        refuse_metadata_above(found.values(), path)
    return found or {"train": path}


def split_folder(path: Path, split: str) -> Path:
    """Folder of one split. Raises DataError when there is none."""
    splits = splits_of(path)
    if split not in splits:
        raise DataError(f'{path} has no split "{split}"; it has {", ".join(splits)}')
    return splits[split]


def _split_name(name: str) -> str:
    """The usual name of a split whose folder is called so, however it is spelled; another name as it is."""
    usual = ALIASES.get(name.lower(), name.lower())
    return usual if usual in SPLITS else name


def _is_split(folder: Path) -> bool:
    return (folder / METADATA).is_file() or bool(shard_paths(folder))


def _is_class(folder: Path) -> bool:
    """Whether images lie in a folder itself, without captions beside them."""
    files = [file for file in folder.iterdir() if file.is_file()]
    suffixes = {file.suffix.lower() for file in files}
    return bool(suffixes & set(IMAGE_SUFFIXES)) and ".txt" not in suffixes


def _fitted(entry: Entry, size: int, background: Colour, fit: Fit) -> NDArray[np.uint8]:
    image: Image.Image = fit_square(decode(entry.read()), size, fit)
    return composite(np.asarray(image, np.uint8), background)


def _of_groups(
    entries: Sequence[Entry], wanted: Collection[str], folder: Path, splits: Collection[Path]
) -> list[Entry]:
    """The entries of a split that are in the groups. Raises DataError for one that no split has, and where none is."""
    present = _groups(entries)
    unknown = set(wanted) - present
    for split in splits:
        if unknown and split != folder:
            unknown -= _groups(found for found in read_entries(split) if isinstance(found, Entry))
    kept = [entry for entry in entries if _groups([entry]) & set(wanted)]
    if unknown or not kept:
        missing = ", ".join(sorted(unknown or wanted))
        raise DataError(f"{folder} has no group {missing}; it has {', '.join(sorted(present)) or 'none'}")
    return kept


def _groups(entries: Iterable[Entry]) -> set[str]:
    named = [entry.record.fields.get(field) for entry in entries for field in ("group", "subgroup")]
    return {str(name) for name in named if name is not None}


def _examples(skipped: Sequence[Skipped]) -> str:
    if not skipped:
        return ""
    return f": {len(skipped)} skipped, the first is {skipped[0]}"


def _class_of(record: Record) -> str:
    if record.class_name is None:
        raise DataError(f'{record.file_name} has neither "class_name" nor "group" to be its class')
    return record.class_name
