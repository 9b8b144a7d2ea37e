"""The bundles of the catalogue as they were last looked at."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from engines.bundle import BundleError
from service.models.catalogue import Catalogue, Entry, ModelError
from service.models.refused import Refused
from service.telemetry.logs import describe

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0


class Known:
    """Which bundles there are, by their keys, name@revision; empty until `read`."""

    def __init__(self, catalogue: Catalogue, refused: Refused, clock: Callable[[], float] = time.monotonic) -> None:
        self.entries: Mapping[str, Entry] = {}
        self._catalogue = catalogue
        self._refused = refused
        self._clock = clock
        self._problems: Mapping[Path, str] = {}
        self._again = -math.inf
        self._lock = threading.Lock()

    def is_due(self) -> bool:
        """Whether nobody has looked for a second or so; whoever is told so looks."""
        with self._lock:
            if self._clock() < self._again:
                return False
            self._again = self._clock() + LOOK_EVERY_S
            return True

    def read(self) -> None:
        """Look. What cannot be read is in the log, once; what cannot be listed is known as it was."""
        with self._lock:
            self._again = self._clock() + LOOK_EVERY_S
        try:
            entries, problems = self._catalogue.read()
        except BundleError as error:
            logger.warning("the bundles cannot be listed", extra=describe(error))
            return
        for path, problem in problems.items() - self._problems.items():
            logger.warning("a bundle cannot be read", extra={"folder": str(path), "detail": problem})
        self._problems = problems
        self.entries = {entry.manifest.model: entry for entry in entries}
        for entry in entries:
            with contextlib.suppress(ModelError):  # It still does not load.
                self._refused.check(entry)
