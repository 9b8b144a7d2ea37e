"""What is known of one bundle that is loaded. Decides nothing."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

from engines.backends.standin import BuildState
from engines.manifest import Manifest
from engines.pipeline import Pipeline
from service.threads import uncancellable


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
    gone: Future[None] = field(default_factory=uncancellable)

    @property
    def manifest(self) -> Manifest:
        """That of its bundle."""
        return self.pipeline.manifest

    @property
    def retiring(self) -> bool:
        """Whether it is to be closed."""
        return self.retired is not None

    def state(self) -> ModelState:
        """What is said of it."""
        name, revision = self.manifest.name, self.manifest.revision
        stand_ins = self.pipeline.stand_ins
        return ModelState(name, revision, True, self.retiring, self.memory_bytes, self.holders, stand_ins)
