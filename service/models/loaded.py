"""What is known of one bundle that is loaded. Decides nothing."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

from engines.backends.standin import BuildState
from engines.pipeline import Pipeline


@dataclass(frozen=True)
class ModelState:
    """What the service says of one bundle. ``holders`` counts requests and jobs that use it now.

    ``stand_ins`` are its graphs for which another engine answers than was asked for.
    """

    name: str
    revision: str
    loaded: bool
    retiring: bool
    memory_bytes: int
    holders: int
    stand_ins: Mapping[str, BuildState] = field(default_factory=dict)


def pending() -> Future[None]:
    """A future of which one who waits and gives up does not cancel it for the others."""
    future: Future[None] = Future()
    future.set_running_or_notify_cancel()
    return future


@dataclass(eq=False)
class Loaded:
    """A pipeline, what it takes, how many hold it and how many of them are requests, and when it was last asked for.

    Retiring, it serves what was accepted and no more; drained, that is done too; closing, it serves nothing.
    """

    pipeline: Pipeline
    memory_bytes: int
    used: float
    holders: int = 0
    requests: int = 0
    waited_for: bool = True
    retired: float | None = None
    drained: bool = False
    closing: bool = False
    gone: Future[None] = field(default_factory=pending)

    @property
    def key(self) -> str:
        """`name@revision`."""
        return self.pipeline.manifest.model

    @property
    def retiring(self) -> bool:
        """Whether it is to be closed."""
        return self.retired is not None

    def answers_to(self, name: str) -> bool:
        """Whether ``name`` is its name, or its name@revision."""
        return name in (self.pipeline.manifest.name, self.key)

    def state(self) -> ModelState:
        """What is said of it."""
        name, revision, stand_ins = (
            self.pipeline.manifest.name,
            self.pipeline.manifest.revision,
            self.pipeline.stand_ins,
        )
        return ModelState(name, revision, True, self.retiring, self.memory_bytes, self.holders, stand_ins)
