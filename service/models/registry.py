"""The bundles that are loaded, who holds them, and how much memory they take. Least recently used go first."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from engines.bundle import BundleError, load_bundle
from engines.pipeline import Pipeline
from service.models.catalogue import Catalogue, Entry, LoadsEnded, ModelError, unreadable
from service.models.known import LOOK_EVERY_S, Known
from service.models.loaded import Loaded, ModelState
from service.models.memory import trim
from service.models.refused import Refused
from service.telemetry.logs import describe
from service.threads import finish_after, finished, uncancellable

logger = logging.getLogger(__name__)

# How long a pipeline that was just loaded is left to those who waited for it.
_FIRST_USE_S = 1.0
# What was submitted before its process saw that a revision is the last one arrives within this.
_STRAGGLERS_S = 2 * LOOK_EVERY_S

OpenPath = Callable[[Path], Pipeline]
Changed = Callable[[Pipeline, bool], None]
"""Told of a pipeline that was loaded (True), or that is about to be closed as the last of its model (False)."""

Owes = Callable[[str], bool]
"""Whether the queue has jobs for a name@revision that are not settled."""


class Lease:
    """A pipeline that stays open until this is released. Release once; later calls do nothing.

    That of a request says that a job for the pipeline may come, or wait.
    """

    def __init__(self, models: Models, loaded: Loaded, request: bool) -> None:
        self._models = models
        self._loaded: Loaded | None = loaded
        self._request = request
        self.pipeline = loaded.pipeline

    def again(self) -> Lease:
        """Another lease of the same pipeline, also while it is retiring."""
        assert self._loaded is not None
        return self._models._hold(self._loaded, self._request)

    def release(self) -> None:
        """Give it back."""
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            self._models._release(loaded, self._request)


class Models:
    """Pipelines by name, loaded when they are first asked for, together within a bound of memory.

    What is asked for and does not fit waits until the least recently used pipeline is closed, and that is closed when
    the last who hold it are done: nobody loses a pipeline that is in use. Loads take turns.

    The catalogue is looked at every second or so, by the worker or, where there is none, by requests. Where it has
    another revision of what is loaded, that is loaded and takes over. The older one cannot be loaded again, so it
    stays until the queue owes nothing of it, at most ``drain_s``.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        opener: OpenPath,
        max_bytes: int,
        changed: Changed = lambda pipeline, loaded: None,
        clock: Callable[[], float] = time.monotonic,
        *,
        owes: Owes = lambda key: False,
        drain_s: float = math.inf,
        fronts: bool = False,
    ) -> None:
        """Open pipelines by ``opener``, warm, for at most ``max_bytes`` of weights, as `Entry.memory_bytes` has it.

        ``fronts`` have no engines, jobs run elsewhere: a newer revision is waited for, and the older one goes at once.
        """
        self.catalogue = catalogue
        self.max_bytes = max_bytes
        self._opener = opener
        self._changed_hook = changed
        self._clock = clock
        self._owes = owes
        self._drain_s = drain_s
        self._fronts = fronts
        self._refused = Refused(clock)
        self._loaded: list[Loaded] = []
        self._loading: dict[str, Future[None]] = {}
        self._moved = threading.Condition()
        self._closed = False
        self._known = Known(catalogue, self._refused, clock)
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._closer = ThreadPoolExecutor(1, thread_name_prefix="closer")

    def lease(self, name: str | None) -> Lease | None:
        """The pipeline of that name or name@revision (None: the default) for a request, if it is loaded.

        None too where its newer revision is to be waited for, by `load`.
        """
        wanted = self.catalogue.default_name if name is None else name
        if self._fronts:  # Elsewhere the worker looks.
            self._look()
        with self._moved:
            if self._fronts and any(key.partition("@")[0] == wanted for key in self._loading):
                return None
            for loaded in reversed(self._loaded):
                if loaded.manifest.answers_to(wanted) and not loaded.retiring:
                    return self._hold(loaded, request=True)
        return None

    def take_on(self, key: str) -> Lease | None:
        """The pipeline of that name@revision for a job that was taken, if it is loaded, also where it retires."""
        with self._moved:
            for loaded in reversed(self._loaded):
                if loaded.manifest.model == key and not loaded.closing:
                    return self._hold(loaded, request=False)
        return None

    def load(self, name: str | None) -> Future[None]:
        """Load the bundle of that name as its folder has it now, unless it is loaded; the future fails with ModelError.

        An older revision that is loaded serves until the new one is there, if both fit. Raises UnknownModel for a name
        that is not in the catalogue, and ModelError.
        """
        try:
            return self._begin(self.catalogue.find(name))
        except BundleError as error:
            raise unreadable(error) from error

    def unload(self, name: str) -> Future[None]:
        """Close the pipelines of that name when those who hold them are done; the future is then done.

        What is being loaded is closed once it is there. Who asks for the name meanwhile, or later, gets it loaded anew.
        Raises UnknownModel where none has that name, and BundleError where the catalogue cannot tell.
        """
        self._known.read()
        gone: Future[None] = uncancellable()

        def close(_: object = None) -> None:
            with self._moved:
                found = [loaded for loaded in self._loaded if loaded.manifest.answers_to(name)]
                for loaded in found:
                    self._retire(loaded)
            finish_after([loaded.gone for loaded in found], gone)

        with self._moved:
            loading = [future for key, future in self._loading.items() if name in (key, key.partition("@")[0])]
            known = loading or any(loaded.manifest.answers_to(name) for loaded in self._loaded)
        if not known:
            self.catalogue.find(name)
        if loading:
            loading[-1].add_done_callback(close)
        else:
            close()
        return gone

    def states(self) -> list[ModelState]:
        """Every bundle that is loaded, the newest first, or could be."""
        entries, _ = self.catalogue.read()
        states = self.loaded()
        there = {(state.name, state.revision) for state in states}
        return states + [
            ModelState(entry.manifest.name, entry.manifest.revision, False, False, entry.memory_bytes, 0)
            for entry in entries
            if (entry.manifest.name, entry.manifest.revision) not in there
        ]

    def loaded(self) -> list[ModelState]:
        """Every bundle that is loaded, the newest first."""
        with self._moved:
            return [loaded.state() for loaded in reversed(self._loaded)]

    def takeable(self) -> frozenset[str]:
        """The keys, name@revision, of the bundles that are loaded or could be: what a worker may take jobs for.

        Not those that only finish what was begun, or others would wait for their place for ever.
        """
        if self._look():
            self._drain()
        with self._moved:
            serving = {loaded.manifest.model for loaded in self._loaded if self._takes_on(loaded)}
            leaving = {loaded.manifest.model for loaded in self._loaded} - serving
            return frozenset(self._known.entries.keys() | serving) - leaving

    def refused(self) -> frozenset[str]:
        """The keys of the bundles that did not load, as far as their files are known to be the same."""
        return self._refused.models

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

    def _look(self, *, now: bool = False) -> bool:
        """Learn which bundles there are, and follow new revisions; False, and nothing, where that was a moment ago."""
        if not now and not self._known.is_due():
            return False
        self._known.read()
        self._follow()
        return True

    def _follow(self) -> None:
        """Begin to load the revisions that replaced those that are loaded."""
        with self._moved:
            replaced = [
                loaded
                for loaded in self._loaded
                if not loaded.retiring and loaded.manifest.model not in self._known.entries
            ]
        for loaded in replaced:
            name = loaded.pipeline.manifest.name
            newer = [entry for entry in self._known.entries.values() if entry.manifest.answers_to(name)]
            if len(newer) == 1:
                with contextlib.suppress(ModelError):  # It did not load; the log has it.
                    self._begin(newer[0])

    def _drain(self) -> None:
        """Close the revisions that cannot be loaded again when all that was accepted for them is done.

        It asks the queue, so only a worker's thread may wait for it.
        """
        with self._moved:
            retiring = [loaded for loaded in self._loaded if loaded.retiring and not loaded.closing]
        for loaded in retiring:
            if not self._may_go(loaded) and self._is_over(loaded):
                loaded.drained = True
            with self._moved:
                self._close_if_free(loaded)

    def _is_over(self, retiring: Loaded) -> bool:
        assert retiring.retired is not None
        age_s = self._clock() - retiring.retired
        return age_s >= self._drain_s or (age_s >= _STRAGGLERS_S and not self._owes(retiring.manifest.model))

    def _takes_on(self, loaded: Loaded) -> bool:
        """Whether jobs may still be taken for it.

        Where it retires, only those that requests here wait for, and those that can be done with no other.
        """
        if not loaded.retiring:
            return True
        return not loaded.closing and (loaded.requests > 0 or not self._may_go(loaded))

    def _may_go(self, loaded: Loaded) -> bool:
        """Whether nobody needs it whose job was accepted: it can be loaded again, or all of them are done."""
        return loaded.drained or self._fronts or loaded.manifest.model in self._known.entries

    def _begin(self, entry: Entry) -> Future[None]:
        with self._moved:
            if self._closed:
                raise LoadsEnded()
            if any(loaded.manifest.model == entry.manifest.model and not loaded.retiring for loaded in self._loaded):
                return finished()
            if entry.manifest.model not in self._loading:
                self._refused.check(entry)
                self._loading[entry.manifest.model] = uncancellable()
                self._loader.submit(self._load, entry, self._loading[entry.manifest.model])
            return self._loading[entry.manifest.model]

    def _load(self, entry: Entry, future: Future[None]) -> None:
        fingerprint = entry.fingerprint()
        try:
            self._check(entry)
            self._make_room(entry.memory_bytes)
            pipeline = self._open(entry, fingerprint)
        except LoadsEnded as error:
            self._settle(entry, future, error)
            return
        except BaseException as error:  # whatever it is, nobody may wait for ever
            logger.error("a bundle does not load", extra={"model": entry.manifest.model, **describe(error)})
            self._settle(entry, future, self._refused.note(entry, fingerprint, error))
            return
        with self._moved:
            for older in self._loaded:
                if older.manifest.answers_to(entry.manifest.name):
                    self._retire(older)
            self._loaded.append(Loaded(pipeline, entry.memory_bytes, self._clock()))
        trim()  # Reading and laying out the weights took more than they take.
        self._changed_hook(pipeline, True)  # Now, as an older one of its model that closes says nothing any more.
        logger.info("loaded", extra={"model": entry.manifest.model, **({} if self._fronts else _backend_of(pipeline))})
        self._settle(entry, future, None)

    def _open(self, entry: Entry, fingerprint: Hashable) -> Pipeline:
        """The pipeline of what room was made for: meanwhile its folder may have come to hold something else."""
        if entry.fingerprint() == fingerprint:
            pipeline = self._opener(entry.path)
            if pipeline.manifest.model == entry.manifest.model:
                return pipeline
            pipeline.close()
        told = f"{entry.manifest.model} was replaced while it was opened"
        raise ModelError(told, told, passing=True)

    def _check(self, entry: Entry) -> None:
        """Raise for what needs no room, as it cannot be loaded, before others make room for it."""
        if entry.memory_bytes > self.max_bytes:
            raise ModelError(
                f"{entry.manifest.name} takes {entry.memory_bytes:,} bytes, the bound is {self.max_bytes:,}"
            )
        if self.memory_bytes + entry.memory_bytes > self.max_bytes:
            load_bundle(entry.path)
        self._look(now=True)  # Who retires should know which revisions are the last.

    def _settle(self, entry: Entry, future: Future[None], error: ModelError | None) -> None:
        with self._moved:
            del self._loading[entry.manifest.model]
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    def _make_room(self, wanted: int) -> None:
        """Retire the least recently used until the rest leaves ``wanted`` bytes, and wait until they are closed."""
        with self._moved:
            while not self._closed and self.memory_bytes + wanted > self.max_bytes:
                staying = [loaded for loaded in self._loaded if not loaded.retiring]
                free = [loaded for loaded in staying if self._had_its_turn(loaded)]
                if sum(loaded.memory_bytes for loaded in staying) + wanted <= self.max_bytes:
                    self._moved.wait()
                elif free:
                    self._retire(min(free, key=lambda loaded: loaded.used))
                else:
                    self._moved.wait(_FIRST_USE_S)
            if self._closed:
                raise LoadsEnded()

    def _had_its_turn(self, loaded: Loaded) -> bool:
        """Whether those who waited for it had it, or had the time."""
        return not loaded.waited_for or self._clock() >= loaded.used + _FIRST_USE_S

    def _retire(self, loaded: Loaded) -> None:
        if not loaded.retiring:
            loaded.retired = self._clock()
            self._close_if_free(loaded)

    def _drop(self, loaded: Loaded) -> None:
        try:
            with self._moved:
                if not any(
                    other.manifest.model == loaded.manifest.model for other in self._loaded if other is not loaded
                ):
                    self._changed_hook(loaded.pipeline, False)
            loaded.pipeline.close()
            trim()
        except Exception as error:  # whatever it is, its room is counted as free: nobody can use it any more
            logger.error("a bundle does not close", extra={"model": loaded.manifest.model, **describe(error)})
        finally:
            with self._moved:
                self._loaded.remove(loaded)
                self._moved.notify_all()
            loaded.gone.set_result(None)
        logger.info("unloaded", extra={"model": loaded.manifest.model})

    def _hold(self, loaded: Loaded, request: bool) -> Lease:
        with self._moved:
            loaded.holders += 1
            loaded.requests += request
            loaded.used = self._clock()
            if loaded.waited_for:
                loaded.waited_for = False
                self._moved.notify_all()
        return Lease(self, loaded, request)

    def _release(self, loaded: Loaded, request: bool) -> None:
        with self._moved:
            loaded.holders -= 1
            loaded.requests -= request
            loaded.used = self._clock()
            self._close_if_free(loaded)

    def _close_if_free(self, loaded: Loaded) -> None:
        unused = loaded.retiring and loaded.holders == 0 and self._may_go(loaded)
        if unused and not loaded.closing and not self._closed:
            loaded.closing = True
            self._closer.submit(self._drop, loaded)


def _backend_of(pipeline: Pipeline) -> dict[str, object]:
    """Fields for a log line: what runs it, and why `auto` passed over what would be better."""
    return {"backend": pipeline.backend} | ({"passed_over": pipeline.passed_over} if pipeline.passed_over else {})
