"""An engine that is slow to make, and another that answers until it is there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from threading import Lock, Thread
from types import TracebackType
from typing import Literal, Self, TypeVar

from engines.backends.base import Array, Engine, EngineError, TensorSpec

BuildState = Literal["building", "built", "failed"]

Wanted = Callable[[], bool]
"""Whether anybody still waits for what is being made."""

_Result = TypeVar("_Result")

_log = logging.getLogger(__name__)
_one_at_a_time = Lock()


class StandIn:
    """An Engine that is ``stand_in`` at first, and what ``make`` gives as soon as that is there.

    Where making fails, it stays the stand-in, and `failure` says why.
    """

    def __init__(self, stand_in: Engine, make: Callable[[Wanted], Engine], name: str) -> None:
        """Begin to make the engine in the background, after those that are being made already.

        ``make`` may ask now and then whether it is still wanted, and give up with an EngineError.
        """
        self._engine, self._make, self.name = stand_in, make, name
        self._closed = self._has_taken_over = False
        self._lock = Lock()
        self.failure: Exception | None = None
        self._thread = Thread(target=self._replace, name=f"building {name}", daemon=True)
        self._thread.start()

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What `run` takes."""
        return self._engine.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What `run` gives."""
        return self._engine.outputs

    @property
    def current(self) -> Engine:
        """The engine that answers now."""
        return self._engine

    @property
    def state(self) -> BuildState:
        """How far the engine that was asked for is; once it is built, it answers."""
        if self._has_taken_over:
            return "built"
        return "building" if self.failure is None else "failed"

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run the engine that is there. Raises EngineError as it does."""
        return self._ask(lambda engine: engine.run(inputs))

    def warmup(self, batch_sizes: Sequence[int]) -> None:
        """Warm up the engine that is there; the one to come is warm when it comes."""
        self._ask(lambda engine: engine.warmup(batch_sizes))

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until the engine is made, or has failed; whether that is so."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _ask(self, question: Callable[[Engine], _Result]) -> _Result:
        """Ask the engine that is there; where another one has taken over meanwhile, and closed it, ask that one."""
        asked = self._engine
        try:
            return question(asked)
        except EngineError:
            if asked is self._engine:
                raise
        return question(self._engine)

    def _replace(self) -> None:
        with _one_at_a_time:
            if self._closed:
                return
            try:
                made = self._make(lambda: not self._closed)
            except Exception as error:  # whatever it is, the stand-in goes on
                self.failure = error
                if not self._closed:
                    _log.warning("%s could not be built and stays on its stand-in: %s", self.name, error)
                return
        with self._lock:
            unwanted = made if self._closed else self._engine
            if not self._closed:
                self._engine, self._has_taken_over = made, True
                _log.info("%s is built and has taken over", self.name)
        unwanted.__exit__(None, None, None)

    def __enter__(self) -> Self:
        """Return the engine, which is open already."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the engine that is there; one that is still being made is closed when it is done."""
        with self._lock:
            self._closed = True
        self._engine.__exit__(kind, error, trace)


def wait_until_built(engine: Engine) -> None:
    """Wait until an engine is the one that was asked for and no stand-in. Raises EngineError where it cannot be."""
    if isinstance(engine, StandIn):
        engine.wait()
        if engine.failure is not None:
            raise EngineError(f"{engine.name} could not be built: {engine.failure}") from engine.failure
