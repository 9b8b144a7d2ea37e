"""Which bundles a service may load: the one it was started with, and those in a folder that may change as it runs."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path

from engines.bundle import MANIFEST_NAME, BundleError, Manifest, find_bundle, read_manifest
from engines.hashes import stamps_of
from engines.manifest import WEIGHT_BITS
from service.models.opening import lone_threads
from service.settings import Settings

logger = logging.getLogger(__name__)

_FP32_BITS = 32


class UnknownModel(Exception):
    """No bundle has that name, or not in that revision; the message says which there are."""


class ModelError(Exception):
    """A bundle cannot be loaded: it is damaged, does not open, or is larger than the bound on memory.

    ``told`` is for clients: the message itself may name folders of this host. ``passing``: it may load later as it is.
    """

    def __init__(self, message: str, told: str | None = None, *, passing: bool = False) -> None:
        """Without ``told``, clients are told the message."""
        super().__init__(message)
        self.told = message if told is None else told
        self.passing = passing


class LoadsEnded(ModelError):
    """Nothing is loaded any more: the service is shutting down."""

    def __init__(self) -> None:
        super().__init__("the service is shutting down")


@dataclass(frozen=True)
class Entry:
    """A bundle that may be loaded: its folder, its manifest as it is there now, and how often its weights are held."""

    path: Path
    manifest: Manifest
    copies: int = 1

    @property
    def memory_bytes(self) -> int:
        """What its weights take when loaded, at most: every graph in fp32. Images in the making come on top."""
        narrowest = min(WEIGHT_BITS[name] for name in self.manifest.weights_dtype.split("+"))
        stored = sum(record.size_bytes for record in self.manifest.files.values())
        return self.copies * _FP32_BITS // narrowest * stored

    def fingerprint(self) -> Hashable:
        """What changes with the files in its folder; None where that cannot be read."""
        try:
            return stamps_of(self.path)
        except OSError:
            return None


def unreadable(error: BundleError) -> ModelError:
    """A bundle of the catalogue cannot be read now; the log says why."""
    logger.warning("a bundle cannot be read", extra={"detail": str(error)})
    return ModelError(str(error), "the bundle cannot be read; the log says why", passing=True)


class Catalogue:
    """The bundles there are, by name; a folder of bundles is read anew at every question."""

    def __init__(self, default: str, folder: Path | None, copies: int = 1) -> None:
        """Take the bundle that stands for all requests that name none, and a folder whose sub-folders are bundles.

        ``copies`` is how often what is loaded holds its weights.
        """
        self._default = default
        self._folder = folder
        self._copies = copies
        self._default_name: str | None = None

    @property
    def default_name(self) -> str:
        """The name of the default bundle when it was last read. Raises BundleError where it never could be."""
        return self._default_name or self.default().manifest.name

    @classmethod
    def of(cls, settings: Settings) -> Catalogue:
        """The catalogue that the settings name."""
        return cls(settings.bundle, settings.models, 2 if lone_threads(settings) else 1)

    def default(self) -> Entry:
        """The bundle of requests that name none. Raises BundleError where it cannot be read."""
        entry = self._entry(find_bundle(self._default).resolve())
        self._default_name = entry.manifest.name
        return entry

    def find(self, name: str | None) -> Entry:
        """The bundle of that name or name@revision, the default for None.

        Raises UnknownModel where there is none, and BundleError where two have the name, or the default is away.
        """
        if name is None:
            return self.default()
        entries, _ = self.read()
        found = [entry for entry in entries if entry.manifest.answers_to(name)]
        if not found and name.partition("@")[0] == self.default_name:
            self.default()  # Where it is away for a moment, this says so.
        if not found:
            known = ", ".join(sorted(entry.manifest.name for entry in entries))
            raise UnknownModel(f"no model {name[:100]!r}; there are: {known}")
        if len(found) > 1:
            raise BundleError(f"{found[0].path} and {found[1].path} are both called {found[0].manifest.name}")
        return found[0]

    def read(self) -> tuple[list[Entry], Mapping[Path, str]]:
        """Every bundle that can be read, the default first, and what is wrong with the folders of the others.

        A copy of a bundle, of the same name and revision, is not another one.
        """
        entries: dict[str, Entry] = {}
        problems: dict[Path, str] = {}
        try:
            default = self.default()
            entries[default.manifest.model] = default
        except BundleError as error:
            problems[Path(self._default)] = str(error)
        for path in self._in_folder():
            try:
                entry = self._entry(path)
                entries.setdefault(entry.manifest.model, entry)
            except BundleError as error:
                problems[path] = str(error)
        return list(entries.values()), problems

    def _entry(self, path: Path) -> Entry:
        return Entry(path, read_manifest(path), self._copies)

    def _in_folder(self) -> list[Path]:
        if self._folder is None:
            return []
        try:
            return sorted(path.parent.resolve() for path in self._folder.glob(f"*/{MANIFEST_NAME}"))
        except OSError as error:
            raise BundleError(f"{self._folder}: {error}") from error
