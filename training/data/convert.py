"""Goes through the sets that people bring: what is in them, what is broken, and packing them into shards."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from training.data.captioned import read_entries, splits_of
from training.data.entries import DataError, Entry, Skipped
from training.data.folder import building
from training.data.pixels import decode
from training.data.shards import ShardWriter


@dataclass
class SplitReport:
    """What a split holds. Sizes are (width, height) in pixels, of the smallest and largest area."""

    split: str
    images: int = 0
    captions: int = 0
    smallest: tuple[int, int] | None = None
    largest: tuple[int, int] | None = None
    groups: Counter[str] = field(default_factory=Counter)
    skipped: list[Skipped] = field(default_factory=list)

    def add(self, entry: Entry, size: tuple[int, int]) -> None:
        """Counts one good image."""
        self.images += 1
        self.captions += len(entry.record.texts)
        area = size[0] * size[1]
        if self.smallest is None or area < self.smallest[0] * self.smallest[1]:
            self.smallest = size
        if self.largest is None or area > self.largest[0] * self.largest[1]:
            self.largest = size
        if entry.record.class_name is not None:
            self.groups[entry.record.class_name] += 1


def check(path: Path) -> list[SplitReport]:
    """Decodes every image of a set and reports on each split. Raises DataError when it is not a folder."""
    reports = []
    for split, folder in splits_of(path).items():
        report = SplitReport(split)
        for _ in good_entries(folder, report):
            pass
        reports.append(report)
    return reports


def write_shards(source: Path, out: Path, per_shard: int = 1000, overwrite: bool = False) -> list[SplitReport]:
    """Packs a set into WebDataset shards, `<split>/000000.tar` and on, and reports on each split.

    Image files go in as they are. What is broken is left out and named in the report.

    Raises:
        DataError: the source is not a folder, or a split has nothing usable.
        OutputExistsError: `out` exists and is not to be replaced.
    """
    splits = splits_of(source)
    reports = []
    with building(out, overwrite) as root:
        for split, folder in splits.items():
            report = SplitReport(split)
            with ShardWriter(root / split, per_shard) as writer:
                for entry, data in good_entries(folder, report):
                    writer.write(entry.record, data)
            if not report.images:
                raise DataError(f"{folder} holds no usable captioned image; {len(report.skipped)} skipped")
            reports.append(report)
        if (source / "dataset.json").is_file():
            shutil.copyfile(source / "dataset.json", root / "dataset.json")
    return reports


def good_entries(folder: Path, report: SplitReport) -> Iterator[tuple[Entry, bytes]]:
    """Entries whose image decodes, with the bytes of its file; `report` takes the counts and the rest."""
    found = list(read_entries(folder))
    for entry in tqdm(found, desc=f"reading {folder.name}", unit="image", disable=None, leave=False):
        if isinstance(entry, Skipped):
            report.skipped.append(entry)
            continue
        try:
            data = entry.read()
            size = decode(data).size
        except (OSError, ValueError) as error:
            report.skipped.append(Skipped(entry.record.file_name, str(error)))
            continue
        report.add(entry, size)
        yield entry, data
