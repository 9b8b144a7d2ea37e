"""A stand-in: it answers until the engine is made, and nothing is lost when that takes over."""

from __future__ import annotations

from threading import Event
from typing import Any

import pytest

from engines.backends.base import Array, EngineError, EngineOptions, GraphSpec
from engines.backends.fake import FakeEngine
from engines.backends.standin import StandIn, Wanted, wait_until_built
from engines.bundle import Bundle
from tests.engines.test_engine_contract import graph_of, random_inputs


class Replaced(FakeEngine):
    """An engine that is replaced, and closed, just before it would answer."""

    def __init__(self, graph: GraphSpec) -> None:
        super().__init__(graph, EngineOptions())
        self.take_over, self.closed = Event(), Event()

    def run(self, inputs: Any) -> dict[str, Array]:
        self.take_over.set()
        assert self.closed.wait(60)
        return super().run(inputs)

    def close(self) -> None:
        super().close()
        self.closed.set()


@pytest.mark.parametrize("question", ["run", "warmup"])
def test_who_asks_while_the_engine_takes_over_is_answered_by_it(text_bundle: Bundle, question: str) -> None:
    graph = graph_of(text_bundle, "step")
    replaced, made = Replaced(graph), FakeEngine(graph, EngineOptions())

    def make(wanted: Wanted) -> FakeEngine:
        assert replaced.take_over.wait(60)
        return made

    with StandIn(replaced, make, "step") as engine:
        inputs = random_inputs(engine, 2)
        if question == "run":
            assert engine.run(inputs).keys() == made.run(inputs).keys()
        else:
            engine.warmup((1, 2))
        assert engine.current is made


def test_an_error_of_the_engine_that_is_there_stays_one(text_bundle: Bundle) -> None:
    graph, go_on = graph_of(text_bundle, "step"), Event()

    def make(wanted: Wanted) -> FakeEngine:
        assert go_on.wait(60)
        return FakeEngine(graph, EngineOptions())

    with StandIn(FakeEngine(graph, EngineOptions()), make, "step") as engine:
        with pytest.raises(EngineError, match="missing"):
            engine.run({})
        go_on.set()


def test_waiting_for_what_cannot_be_built_is_an_error(text_bundle: Bundle) -> None:
    def fail(wanted: Wanted) -> FakeEngine:
        raise RuntimeError("there is no compiler")

    plain = FakeEngine(graph_of(text_bundle, "step"), EngineOptions())
    wait_until_built(plain)
    with (
        StandIn(plain, fail, "step") as engine,
        pytest.raises(EngineError, match="step could not be built: there is no compiler"),
    ):
        wait_until_built(engine)
