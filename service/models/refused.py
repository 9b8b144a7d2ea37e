"""Bundles that did not load: nothing that is loaded goes for them again, and nobody waits for them again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from engines.bundle import BundleError
from service.models.catalogue import Entry, ModelError

# What its files did not cause may be over: the device may have memory again.
_TRY_AGAIN_S = 60.0


@dataclass(frozen=True, slots=True)
class _Refusal:
    fingerprint: Hashable
    until: float
    error: ModelError


class Refused:
    """Why bundles did not load. Known until their files change, or for a minute where those were not the cause."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._refusals: dict[str, _Refusal] = {}

    @property
    def models(self) -> frozenset[str]:
        """The keys, name@revision, of those that did not load, when they were last looked at."""
        return frozenset(self._refusals)

    def check(self, entry: Entry) -> None:
        """Raise ModelError where it did not load and nothing has changed since."""
        refusal = self._refusals.get(entry.manifest.model)
        if refusal is None:
            return
        if self._clock() < refusal.until and entry.fingerprint() == refusal.fingerprint:
            told, passing = refusal.error.told, refusal.error.passing
            raise ModelError(str(refusal.error), told, passing=passing) from refusal.error.__cause__
        self._refusals.pop(entry.manifest.model, None)

    def note(self, entry: Entry, fingerprint: Hashable, error: BaseException) -> ModelError:
        """Learn that it did not load with the files that gave ``fingerprint``. Returns what those who wait are told."""
        refused = error if isinstance(error, ModelError) else _unloadable(entry, error)
        until = self._clock() + _TRY_AGAIN_S if refused.passing else math.inf
        self._refusals[entry.manifest.model] = _Refusal(fingerprint, until, refused)
        return refused


def _unloadable(entry: Entry, error: BaseException) -> ModelError:
    name = entry.manifest.name
    if isinstance(error, BundleError):
        told = f"{name} cannot be loaded: {error}".replace(f"{entry.path}/", "").replace(str(entry.path), name)
    else:
        told = f"{name} cannot be loaded now; the log says why"
    failed = ModelError(f"{name} cannot be loaded: {error}", told, passing=not isinstance(error, BundleError))
    failed.__cause__ = error
    return failed
