"""What a set is made of before any pixel is decoded: entries with captions, and what was skipped and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
# Not read, but named as skipped, since whoever put them there meant them as images.
UNREAD_SUFFIXES = (".svg", ".heic", ".heif", ".jxl")


class DataError(Exception):
    """A set that cannot be used at all."""


class Skipped(NamedTuple):
    """Something left out: the file (with the line, where there is one) and the reason."""

    file: str
    reason: str

    def __str__(self) -> str:
        """One line that any terminal can show, whatever bytes the file's name has."""
        text = f"{self.file}: {self.reason}".encode("utf-8", "backslashreplace").decode()
        return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


@dataclass(frozen=True)
class Record:
    """One image of a set: its name, its captions, and the other fields of its metadata line."""

    file_name: str
    texts: tuple[str, ...]
    fields: Mapping[str, Any]

    @property
    def class_name(self) -> str | None:
        """Its field `class_name`, or else its `group`, if it has one."""
        named = [str(self.fields[field]) for field in ("class_name", "group") if field in self.fields]
        return named[0] if named else None


@dataclass(frozen=True)
class Entry:
    """A record with a way to get the bytes of its image. `read` raises OSError when it cannot."""

    record: Record
    read: Callable[[], bytes]


def captions_of(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """Captions in the fields `texts` (a list) and `text` (one), stripped, without repeats.

    Raises ValueError with a reason to show when there is none, or one is not a string or empty.
    """
    given: list[Any] = []
    for key in ("text", "texts"):
        value = metadata.get(key)
        if isinstance(value, list):
            given += value
        elif says_something(value):
            given.append(value)
    if not given:
        raise ValueError('no caption: neither "text" nor "texts"')
    if not all(isinstance(text, str) for text in given):
        raise ValueError("a caption is not a string")
    if not all(is_text(text) for text in given):
        raise ValueError("a caption has half a surrogate pair")
    captions = [" ".join(text.split()) for text in given]
    if not all(captions):
        raise ValueError("empty caption")
    return tuple(dict.fromkeys(captions))


def fields_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What metadata says beside the name and the captions of an image, without fields that say nothing.

    These are null or, as tables have it, blank. Raises ValueError with a reason to show when what names its class or
    group is not a name, or cannot be encoded.
    """
    named = ("file_name", "text", "texts")
    says = {name: value for name, value in metadata.items() if says_something(value)}
    fields = {name: value for name, value in says.items() if name not in named}
    for name in ("class_name", "group"):
        value = fields.get(name, "")
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise ValueError(f"its {name} is neither a string nor a number")
        if not is_text(str(value)):
            raise ValueError(f"its {name} has half a surrogate pair")
    return fields


def says_something(value: Any) -> bool:
    """Whether a field of metadata is neither null nor, as tables have it, blank."""
    return value is not None and bool(str(value).strip())


def is_text(value: str) -> bool:
    """Whether a string can be encoded: JSON allows half a surrogate pair, UTF-8 does not."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def caption_lines(data: bytes) -> tuple[str, ...]:
    """Captions of a .txt file, one a line. Raises ValueError when it is empty or not UTF-8."""
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"caption is not UTF-8: {error.reason} at byte {error.start}") from error
    return captions_of({"texts": [line for line in lines if line.strip()] or [""]})
