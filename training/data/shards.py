"""WebDataset shards: tar files in which <key>.png lies beside <key>.json and <key>.txt."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any

from training.data.entries import (
    IMAGE_SUFFIXES,
    Entry,
    Record,
    Skipped,
    caption_lines,
    captions_of,
    fields_of,
    says_something,
)
from training.data.pixels import decode

Part = Callable[[], bytes]


def shard_paths(folder: Path) -> list[Path]:
    """Shards of a folder, sorted by name; hidden files are passed over."""
    return sorted(path for path in folder.glob("[!.]*.tar") if path.is_file() or path.is_symlink())


def read_shards(folder: Path) -> Iterator[Entry | Skipped]:
    """Entries of every shard in a folder, in the order of shard names and of the members within.

    Samples need an image, and captions in `<key>.json` ("text" or "texts") or `<key>.txt`, or else a class, which then
    is their caption: `<key>.cls`, its number, or "class_name" in `<key>.json`.
    """
    seen: set[str] = set()
    for shard in shard_paths(folder):
        samples, repeated, fault = _samples(shard)
        for key, parts in samples.items():
            name = f"{shard.name}:{key}"
            found = Skipped(name, "a member comes twice") if key in repeated else captioned_entry(name, parts)
            if isinstance(found, Entry):
                if found.record.file_name in seen:
                    found = Skipped(f"{shard.name}:{key}", f"duplicate file_name {found.record.file_name}")
                else:
                    seen.add(found.record.file_name)
            yield found
        if fault:
            yield Skipped(shard.name, fault)


def _samples(shard: Path) -> tuple[dict[str, dict[str, Part]], set[str], str]:
    """The parts of each sample by key, the keys of which a part comes twice, and what is wrong with the shard."""
    samples: dict[str, dict[str, Part]] = {}
    repeated: set[str] = set()
    try:
        # Plain "r:", since members of a compressed tar cannot be read in place.
        with tarfile.open(shard, "r:") as archive:
            for member in file_members(archive):
                key, suffix = key_and_suffix(member.name)
                if suffix in samples.setdefault(key, {}):
                    repeated.add(key)
                samples[key][suffix] = _part(shard, member.offset_data, member.size)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        return samples, repeated, f"the shard cannot be read to its end: {error}"
    return samples, repeated, ""


def file_members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The files of an uncompressed archive, but for hidden ones, which are of systems and belong to no sample.

    Raises OSError or TarError at its end when it is cut off.
    """
    yield from (member for member in archive if member.isfile() and not PurePosixPath(member.name).name.startswith("."))
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    end = archive.fileobj.read(tarfile.BLOCKSIZE)
    if len(end) < tarfile.BLOCKSIZE or end.strip(b"\0"):  # a header that is cut off reads like the end of the archive
        raise OSError("no end marker")


def key_and_suffix(name: str) -> tuple[str, str]:
    """What a member's name says: the key of its sample and, from the first dot on, which part of it it is."""
    path = PurePosixPath(name)
    stem, _, extension = path.name.partition(".")
    return str(path.with_name(stem)), "." + extension.lower()


def _part(shard: Path, offset: int, size: int) -> Part:
    def read() -> bytes:
        with shard.open("rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) != size:
            raise OSError(f"{shard.name} ends in the middle of the sample")
        return data

    return read


def captioned_entry(name: str, parts: Mapping[str, Part]) -> Entry | Skipped:
    """The entry of a sample's parts by suffix, or why it has none."""
    suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in parts), None)
    if suffix is None:
        return Skipped(name, "the sample has no image")
    try:
        metadata: dict[str, Any] = json.loads(parts[".json"]()) if ".json" in parts else {}
        if not isinstance(metadata, dict):
            raise ValueError("the metadata is not a JSON object")
        fields = fields_of(metadata)
        if ".cls" in parts and not {"class_name", "group"} & set(fields):
            fields["class_name"] = _class_number(parts[".cls"]())
        captioned = any(says_something(metadata.get(name)) for name in ("text", "texts"))
        if ".txt" in parts and not captioned:
            texts = caption_lines(parts[".txt"]())
        elif "class_name" in fields and not captioned:
            texts = captions_of({"text": str(fields["class_name"])})
        else:
            texts = captions_of(metadata)
    except UnicodeDecodeError as error:
        return Skipped(name, f"the metadata is not UTF-8: {error.reason}")
    except (json.JSONDecodeError, RecursionError) as error:
        return Skipped(name, f"the metadata is not JSON: {error}")
    except (OSError, ValueError) as error:
        return Skipped(name, str(error))
    file_name = metadata.get("file_name")
    return Entry(Record(file_name if isinstance(file_name, str) else name + suffix, texts, fields), parts[suffix])


def _class_number(data: bytes) -> str:
    """The number in a .cls file, as the name of a class. Raises ValueError when it is none."""
    try:
        return str(int(data.decode("ascii")))
    except ValueError:
        raise ValueError("its .cls is not a whole number") from None


def _as_png(image: bytes) -> bytes:
    png = io.BytesIO()
    decode(image).save(png, "PNG")
    return png.getvalue()


def add_file(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Adds a file without a date or an owner: the same input gives the same bytes."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


class ShardWriter:
    """Writes samples into numbered shards of a folder, `per_shard` to each; a context manager.

    The same input gives the same bytes.
    """

    def __init__(self, folder: Path, per_shard: int) -> None:
        self.folder = folder
        self.per_shard = per_shard
        self.count = 0
        self._stack = ExitStack()
        self._archive: tarfile.TarFile | None = None

    def __enter__(self) -> ShardWriter:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def write(self, record: Record, image: bytes) -> None:
        """Adds one sample. The image's bytes are stored as they are; a format without a suffix here becomes a PNG."""
        if self._archive is None or self.count % self.per_shard == 0:
            self._stack.close()
            path = self.folder / f"{self.count // self.per_shard:06d}.tar"
            self._archive = self._stack.enter_context(
                tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 - closed by the stack
            )
        key = f"{self.count:09d}"
        metadata = {"file_name": record.file_name, "texts": list(record.texts), **record.fields}
        suffix = PurePosixPath(record.file_name).suffix.lower()
        if suffix not in IMAGE_SUFFIXES:
            suffix, image = ".png", _as_png(image)
        add_file(self._archive, key + suffix, image)
        add_file(self._archive, key + ".json", json.dumps(metadata).encode())
        add_file(self._archive, key + ".txt", record.texts[0].encode())
        self.count += 1
