"""Which bundles a service may load: the one it was started with, and those in a folder that may change as it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from engines.bundle import MANIFEST_NAME, BundleError, Manifest, find_bundle, read_manifest
from service.settings import Settings

# What a stored weight takes once it is unpacked to fp32.
_UNPACKED = {"float32": 1, "fp16": 2, "float16": 2, "int8": 4}


class UnknownModel(Exception):
    """No bundle has that name, or not in that revision; the message says which there are."""


class ModelError(Exception):
    """A bundle cannot be loaded: it is damaged, does not open, or is larger than the bound on memory."""


class LoadsEnded(ModelError):
    """Nothing is loaded any more: the service is shutting down."""

    def __init__(self) -> None:
        super().__init__("the service is shutting down")


@dataclass(frozen=True)
class Entry:
    """A bundle that may be loaded: its folder, and its manifest as it is there now."""

    path: Path
    manifest: Manifest

    @property
    def key(self) -> str:
        """`name@revision`."""
        return self.manifest.model

    @property
    def memory_bytes(self) -> int:
        """What its weights take when loaded. An upper bound: every graph unpacked to fp32."""
        factor = max(_UNPACKED.get(dtype, 1) for dtype in self.manifest.weights_dtype.split("+"))
        return factor * sum(record.size_bytes for record in self.manifest.files.values())

    def answers_to(self, name: str) -> bool:
        """Whether ``name`` is its name, or its name@revision."""
        return name in (self.manifest.name, self.key)


class Catalogue:
    """The bundles there are, by name; a folder of bundles is read anew at every question."""

    def __init__(self, default: str, folder: Path | None) -> None:
        """Take the bundle that stands for all requests that name none, and a folder whose sub-folders are bundles."""
        self._default = default
        self._folder = folder

    @cached_property
    def default_name(self) -> str:
        """The name of the default bundle when it was first asked for. Raises BundleError where it cannot be read."""
        return self.default().manifest.name

    @classmethod
    def of(cls, settings: Settings) -> Catalogue:
        """The catalogue that the settings name."""
        return cls(settings.bundle, settings.models)

    def default(self) -> Entry:
        """The bundle of requests that name none. Raises BundleError where it cannot be read."""
        return _entry(find_bundle(self._default))

    def find(self, name: str | None) -> Entry:
        """The bundle of that name or name@revision, the default for None.

        Raises UnknownModel where there is none, and BundleError where two have the name.
        """
        if name is None:
            return self.default()
        entries, _ = self.read()
        found = [entry for entry in entries if entry.answers_to(name)]
        if not found:
            known = ", ".join(sorted(entry.manifest.name for entry in entries))
            raise UnknownModel(f"no model {name[:100]!r}; there are: {known}")
        if len(found) > 1:
            raise BundleError(f"{found[0].path} and {found[1].path} are both called {found[0].manifest.name}")
        return found[0]

    def read(self) -> tuple[list[Entry], Mapping[Path, str]]:
        """Every bundle that can be read, the default first, and what is wrong with the folders of the others."""
        paths = {find_bundle(self._default).resolve(): None} | dict.fromkeys(self._in_folder())
        entries: list[Entry] = []
        problems: dict[Path, str] = {}
        for path in paths:
            try:
                entries.append(_entry(path))
            except BundleError as error:
                problems[path] = str(error)
        return entries, problems

    def _in_folder(self) -> list[Path]:
        if self._folder is None:
            return []
        try:
            return sorted(path.parent.resolve() for path in self._folder.glob(f"*/{MANIFEST_NAME}"))
        except OSError as error:
            raise BundleError(f"{self._folder}: {error}") from error


def _entry(path: Path) -> Entry:
    return Entry(path, read_manifest(path))
