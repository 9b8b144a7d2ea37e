"""API keys: a file of their hashes, with the rate of each. Knows nothing of HTTP.

A line of the file is `NAME:SHA256[:PER_MINUTE][:admin]`: the SHA-256 of the key in hex, the requests that it may make
in a minute (no bound where absent), and whether it may load and unload bundles. Blank lines and those that begin with
# say nothing. A key is random and long, so one round of SHA-256 keeps it as well as a slow hash would.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

MIN_KEY_CHARS = 20

_KEY_BYTES = 32
_PREFIX = "fs_"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_ADMIN = "admin"
_LEAST_RATE, _LARGEST_RATE = 1e-6, 1e9

Stamp = tuple[int, int, int]

NAMES = "a name has letters, digits, dots, dashes and underscores, 64 at most"


def is_name(name: str) -> bool:
    """Whether a key may be called so."""
    return _NAME.fullmatch(name) is not None


class KeyFileError(ValueError):
    """The file of keys cannot be read. The message names the line, and quotes nothing of it."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is known of a key: never the key itself. ``per_minute`` is None where nothing bounds it."""

    name: str
    digest: str
    per_minute: float | None = None
    admin: bool = False

    @property
    def rate(self) -> str:
        """``per_minute`` as it was written: no digit is lost."""
        return repr(self.per_minute).removesuffix(".0")

    @property
    def line(self) -> str:
        """The line of the file."""
        options = [] if self.per_minute is None else [self.rate]
        return ":".join((self.name, self.digest, *options, *([_ADMIN] if self.admin else [])))


def new_key() -> str:
    """A key that nobody had before: 256 random bits."""
    return _PREFIX + secrets.token_urlsafe(_KEY_BYTES)


def digest_of(key: str) -> str:
    """The SHA-256 of a key, in hex."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def find_key(keys: Sequence[ApiKey], offered: str) -> ApiKey | None:
    """The key that was offered, in a time that does not tell how near the offer came to any of them."""
    digest = digest_of(offered)
    found = None
    for key in keys:
        if hmac.compare_digest(key.digest, digest):
            found = key
    return found


def parse_keys(text: str) -> tuple[ApiKey, ...]:
    """The keys of a file's text. Raises KeyFileError."""
    keys: dict[str, ApiKey] = {}
    for number, line in enumerate(map(str.strip, text.splitlines()), start=1):
        if not line or line.startswith("#"):
            continue
        key = _parse(line, number)
        if key.name in keys or any(key.digest == other.digest for other in keys.values()):
            raise KeyFileError(f"line {number}: its name or its key is there already")
        keys[key.name] = key
    return tuple(keys.values())


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """The keys of a file. Raises KeyFileError."""
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise KeyFileError(f"the file of keys cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise KeyFileError("the file of keys is not UTF-8") from None
    return parse_keys(text)


class KeyFile:
    """The keys of a file that may change as the service runs. Belongs to one thread.

    A file that is damaged or gone leaves the keys as they were, and a line in the log: half a file, as an editor
    writes it, must lock nobody out. To take every key away, leave an empty file.
    """

    def __init__(self, path: Path) -> None:
        """Read the file. Raises KeyFileError."""
        self._path = path
        self._stamp = _stamp(path)
        self._keys = read_keys(path)

    def find(self, offered: str) -> ApiKey | None:
        """The key that was offered, by the file as it is now."""
        self._refresh()
        return find_key(self._keys, offered)

    def _refresh(self) -> None:
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = read_keys(self._path)
        except KeyFileError as error:
            logger.error("the keys stay as they were", extra={"detail": str(error)})
        else:
            logger.info("keys read again", extra={"keys": len(self._keys)})


def _parse(line: str, number: int) -> ApiKey:
    name, _, rest = line.partition(":")
    digest, *options = rest.split(":")
    if not is_name(name):
        raise KeyFileError(f"line {number}: {NAMES}")
    if not _DIGEST.fullmatch(digest):
        raise KeyFileError(f"line {number}: after the name comes the SHA-256 of the key, 64 lower-case hex digits")
    admin = options[-1:] == [_ADMIN]
    rates = options[:-1] if admin else options
    if len(rates) > 1:
        raise KeyFileError(f"line {number}: expected NAME:SHA256[:PER_MINUTE][:{_ADMIN}]")
    return ApiKey(name, digest, _rate(rates[0], number) if rates else None, admin)


def _rate(text: str, number: int) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not _LEAST_RATE <= rate <= _LARGEST_RATE:
        raise KeyFileError(
            f"line {number}: the requests a minute are a number from {_LEAST_RATE:g} to {_LARGEST_RATE:g}"
        )
    return rate


def _stamp(path: Path) -> Stamp | None:
    """What changes when the file does; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
