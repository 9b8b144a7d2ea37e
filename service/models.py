"""The bundles that are loaded, who holds them, and how much memory they take. Least recently used go first."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from engines.bundle import BundleError
from engines.pipeline import Pipeline
from service.catalogue import Catalogue, Entry, LoadsEnded, ModelError
from service.logs import describe
from service.memory import trim

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0

OpenPath = Callable[[Path], Pipeline]
Changed = Callable[[Pipeline, bool], None]
"""Told of a pipeline that was loaded (True) or is about to be closed (False)."""


@dataclass(eq=False)
class _Loaded:
    """A pipeline, what it takes, how many hold it, and when it was last asked for.

    Retiring, it serves what was accepted and no more; closing, not even that.
    """

    pipeline: Pipeline
    memory_bytes: int
    used: float
    holders: int = 0
    retiring: bool = False
    closing: bool = False
    gone: Future[None] = field(default_factory=Future)

    def answers_to(self, name: str) -> bool:
        return name in (self.pipeline.manifest.name, self.pipeline.manifest.model)


class Lease:
    """A pipeline that stays open until this is released. Release once; later calls do nothing."""

    def __init__(self, models: Models, loaded: _Loaded) -> None:
        self._models = models
        self._loaded: _Loaded | None = loaded
        self.pipeline = loaded.pipeline

    def again(self) -> Lease:
        """Another lease of the same pipeline, also while it is retiring."""
        assert self._loaded is not None
        return self._models._hold(self._loaded)

    def release(self) -> None:
        """Give it back."""
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            self._models._release(loaded)


@dataclass(frozen=True)
class ModelState:
    """What the service says of one bundle. ``holders`` counts requests and jobs that use it now."""

    name: str
    revision: str
    loaded: bool
    retiring: bool
    memory_bytes: int
    holders: int


class Models:
    """Pipelines by name, loaded when they are first asked for, together within a bound of memory.

    What is asked for and does not fit waits until the least recently used pipeline is closed, and that is closed when
    the last who hold it are done: nobody loses a pipeline that is in use. Loads take turns.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        opener: OpenPath,
        max_bytes: int,
        changed: Changed = lambda pipeline, loaded: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open pipelines by ``opener``, warm, for at most ``max_bytes`` of weights, as `Entry.memory_bytes` has it."""
        self.catalogue = catalogue
        self.max_bytes = max_bytes
        self._opener = opener
        self._changed_hook = changed
        self._clock = clock
        self._loaded: list[_Loaded] = []
        self._loading: dict[str, Future[None]] = {}
        self._moved = threading.Condition()
        self._closed = False
        self._known: frozenset[str] = frozenset()
        self._look_again = -math.inf
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._closer = ThreadPoolExecutor(1, thread_name_prefix="closer")

    def lease(self, name: str | None, *, retiring: bool = False) -> Lease | None:
        """The pipeline of that name or name@revision (None: the default), if it is loaded; the newest of a name.

        Those that are ``retiring`` only take on what was accepted before.
        """
        wanted = self.catalogue.default_name if name is None else name
        with self._moved:
            for loaded in reversed(self._loaded):
                if loaded.answers_to(wanted) and (retiring or not loaded.retiring) and not loaded.closing:
                    return self._hold(loaded)
        return None

    def load(self, name: str | None) -> Future[None]:
        """Load the bundle of that name as its folder has it now, unless it is loaded; the future fails with ModelError.

        An older revision that is loaded serves until the new one is there, if both fit. Raises UnknownModel for a name
        that is not in the catalogue, and ModelError.
        """
        entry = self._find(name)
        with self._moved:
            if self._closed:
                raise LoadsEnded()
            if any(loaded.answers_to(entry.key) and not loaded.retiring for loaded in self._loaded):
                return _done()
            if entry.key not in self._loading:
                future: Future[None] = Future()
                # One who waits and gives up must not cancel it for the others.
                future.set_running_or_notify_cancel()
                self._loading[entry.key] = future
                self._loader.submit(self._load, entry, future)
            return self._loading[entry.key]

    def unload(self, name: str) -> Future[None]:
        """Close the pipelines of that name when those who hold them are done; the future is then done.

        Who asks for the name meanwhile, or later, gets it loaded anew. Raises UnknownModel where none has that name.
        """
        with self._moved:
            found = [loaded for loaded in self._loaded if loaded.answers_to(name)]
            for loaded in found:
                self._retire(loaded)
        if not found:
            self.catalogue.find(name)
        return found[-1].gone if found else _done()

    def states(self) -> list[ModelState]:
        """Every bundle that is loaded, the newest first, or could be."""
        entries, _ = self.catalogue.read()
        with self._moved:
            states = [
                ModelState(
                    loaded.pipeline.manifest.name,
                    loaded.pipeline.manifest.revision,
                    True,
                    loaded.retiring,
                    loaded.memory_bytes,
                    loaded.holders,
                )
                for loaded in reversed(self._loaded)
            ]
        there = {(state.name, state.revision) for state in states}
        return states + [
            ModelState(entry.manifest.name, entry.manifest.revision, False, False, entry.memory_bytes, 0)
            for entry in entries
            if (entry.manifest.name, entry.manifest.revision) not in there
        ]

    def takeable(self) -> frozenset[str]:
        """The keys, name@revision, of the bundles that are loaded or could be: what a worker may take jobs for.

        What could be loaded is looked up every second or so.
        """
        now = self._clock()
        if now >= self._look_again:
            try:
                self._known = frozenset(entry.key for entry in self.catalogue.read()[0])
            except BundleError as error:
                logger.warning("the bundles cannot be listed", extra=describe(error))
            self._look_again = now + _LOOK_EVERY_S
        with self._moved:
            return self._known | {loaded.pipeline.manifest.model for loaded in self._loaded}

    @property
    def memory_bytes(self) -> int:
        """What the pipelines that are open take together."""
        with self._moved:
            return sum(loaded.memory_bytes for loaded in self._loaded)

    def cancel_loads(self) -> None:
        """Load nothing more; what waits for a load fails with LoadsEnded. A load that runs is finished."""
        with self._moved:
            self._closed = True
            self._moved.notify_all()

    def close(self) -> None:
        """Close everything, held or not, and end the threads."""
        self.cancel_loads()
        self._loader.shutdown(wait=True, cancel_futures=True)
        self._closer.shutdown(wait=True)
        for future in self._loading.values():
            future.set_exception(LoadsEnded())
        self._loading.clear()
        for loaded in self._loaded:
            loaded.pipeline.close()
        self._loaded.clear()

    def _find(self, name: str | None) -> Entry:
        try:
            entry = self.catalogue.find(name)
        except BundleError as error:
            raise ModelError(str(error)) from error
        if entry.memory_bytes > self.max_bytes:
            raise ModelError(
                f"{entry.manifest.name} takes {entry.memory_bytes:,} bytes, the bound is {self.max_bytes:,}"
            )
        return entry

    def _load(self, entry: Entry, future: Future[None]) -> None:
        try:
            self._make_room(entry.memory_bytes)
            pipeline = self._opener(entry.path)
        except LoadsEnded as error:
            self._settle(entry, future, error)
            return
        except Exception as error:
            logger.error("a bundle does not load", extra={"model": entry.key, **describe(error)})
            self._settle(entry, future, error)
            return
        self._changed_hook(pipeline, True)
        with self._moved:
            for older in self._loaded:
                if older.answers_to(entry.manifest.name):
                    self._retire(older)
            self._loaded.append(_Loaded(pipeline, entry.memory_bytes, self._clock()))
        logger.info("loaded", extra={"model": entry.key})
        self._settle(entry, future, None)

    def _settle(self, entry: Entry, future: Future[None], error: Exception | None) -> None:
        with self._moved:
            del self._loading[entry.key]
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error if isinstance(error, ModelError) else _unloadable(entry, error))

    def _make_room(self, wanted: int) -> None:
        """Retire the least recently used until the rest leaves ``wanted`` bytes, and wait until they are closed."""
        with self._moved:
            while not self._closed and sum(loaded.memory_bytes for loaded in self._loaded) + wanted > self.max_bytes:
                staying = [loaded for loaded in self._loaded if not loaded.retiring]
                leaving = sum(loaded.memory_bytes for loaded in self._loaded if loaded.retiring)
                if staying and sum(loaded.memory_bytes for loaded in self._loaded) - leaving + wanted > self.max_bytes:
                    self._retire(min(staying, key=lambda loaded: loaded.used))
                else:
                    self._moved.wait()
            if self._closed:
                raise LoadsEnded()

    def _retire(self, loaded: _Loaded) -> None:
        if not loaded.retiring:
            loaded.retiring = True
            self._close_if_free(loaded)

    def _drop(self, loaded: _Loaded) -> None:
        try:
            self._changed_hook(loaded.pipeline, False)
            loaded.pipeline.close()
            trim()
        finally:
            with self._moved:
                self._loaded.remove(loaded)
                self._moved.notify_all()
            loaded.gone.set_result(None)
        logger.info("unloaded", extra={"model": loaded.pipeline.manifest.model})

    def _hold(self, loaded: _Loaded) -> Lease:
        with self._moved:
            loaded.holders += 1
            loaded.used = self._clock()
        return Lease(self, loaded)

    def _release(self, loaded: _Loaded) -> None:
        with self._moved:
            loaded.holders -= 1
            loaded.used = self._clock()
            self._close_if_free(loaded)

    def _close_if_free(self, loaded: _Loaded) -> None:
        if loaded.retiring and loaded.holders == 0 and not self._closed:
            loaded.closing = True
            self._closer.submit(self._drop, loaded)


def _unloadable(entry: Entry, error: Exception) -> ModelError:
    failed = ModelError(f"{entry.manifest.name} cannot be loaded: {error}")
    failed.__cause__ = error
    return failed


def _done() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future
