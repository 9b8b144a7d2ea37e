"""The scheduler against made-up engines, in simulated time: throughput, fairness, deadlines, no starvation."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field, replace
from random import Random

import pytest

from service.batching.scheduler import Candidate, Scheduler
from service.queue.admission import Door
from service.queue.base import HEAD_START_S

SIZES = (1, 2, 4, 8, 16)
MAX_ROWS = SIZES[-1]

Engine = Callable[[int], float]


def line(a: float, b: float) -> Engine:
    return lambda rows: a * rows + b


def stairs(a: float, b: float) -> Engine:
    """An engine that pads to the next size."""
    return lambda rows: a * next(size for size in SIZES if size >= rows) + b


def best_rate(engine: Engine) -> float:
    """Rows a second in ticks of the best size."""
    return max(rows / engine(rows) for rows in range(1, MAX_ROWS + 1))


@dataclass
class Simulation:
    """One worker, in time that passes by ticks alone. All that has arrived, and was let in, is there to be planned."""

    engines: dict[Hashable, Engine]
    warm: bool = True
    door: Door | None = None
    now: float = 0.0
    done: dict[str, float] = field(default_factory=dict)
    given_up: dict[str, float] = field(default_factory=dict)
    busy_s: dict[Hashable, float] = field(default_factory=lambda: defaultdict(float))
    rows: dict[Hashable, int] = field(default_factory=lambda: defaultdict(int))
    ticks: list[tuple[float, tuple[Candidate, ...]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(MAX_ROWS)
        self.live: dict[str, Candidate] = {}
        self.costs: dict[str, int] = {}
        if self.warm:
            for group, engine in self.engines.items():
                self.scheduler.introduce(group, 1, {size: engine(size) for size in SIZES})

    def run(self, arrivals: Iterable[Candidate], until: float = float("inf")) -> None:
        """Go on until everything is done, or the time is over."""
        coming = [(candidate.arrived, k, candidate) for k, candidate in enumerate(arrivals)]
        heapq.heapify(coming)
        while (coming or self.live) and self.now < until:
            if not self.live and coming:
                self.now = max(self.now, coming[0][0])
            while coming and coming[0][0] <= self.now:
                candidate = heapq.heappop(coming)[2]
                if self._lets_in(candidate):
                    self.live[candidate.job_id] = candidate
            self._tick()

    def _lets_in(self, candidate: Candidate) -> bool:
        if self.door is None:
            return True
        cost, left_s = candidate.remaining, candidate.deadline - candidate.arrived
        self.costs[candidate.job_id] = cost
        let_in = self.door.knock(candidate.job_id, cost, left_s, candidate.arrived) is None
        if let_in:
            self.door.took(cost)
        return let_in

    def _settle(self, job_id: str, finished: bool) -> None:
        del self.live[job_id]
        (self.done if finished else self.given_up)[job_id] = self.now
        if self.door is not None:
            self.door.settled(self.costs[job_id], finished, self.now)

    def _tick(self) -> None:
        plan = self.scheduler.plan(self.live.values(), self.now)
        for job_id in plan.expired | plan.hopeless:
            self._settle(job_id, finished=False)
        assert plan.batch or not self.live, "there was work, and nothing ran"
        if not plan.batch:
            return
        group = plan.batch[0].group
        seconds = self.engines[group](len(plan.batch))
        self.ticks.append((self.now, plan.batch))
        self.now += seconds
        self.busy_s[group] += seconds
        self.rows[group] += len(plan.batch)
        self.scheduler.ticked(group, len(plan.batch), seconds)
        for candidate in plan.batch:
            if candidate.remaining == 1:
                self._settle(candidate.job_id, finished=True)
            else:
                self.live[candidate.job_id] = replace(candidate, remaining=candidate.remaining - 1)


def poisson(
    rng: Random, rate: float, seconds: float, group: Hashable, name: str, timeout_s: float = 1e6, **fields: int
) -> list[Candidate]:
    arrivals, at = [], 0.0
    while (at := at + rng.expovariate(rate)) < seconds:
        arrivals.append(Candidate(f"{name}-{len(arrivals):05}", 0, group, at, at + timeout_s, **fields))
    return arrivals


@pytest.mark.parametrize("engine", [line(0.003, 0.006), line(0.02, 0.0), stairs(0.01, 0.004), stairs(0.001, 0.05)])
def test_throughput_at_saturation_is_that_of_the_best_size(engine: Engine) -> None:
    simulation = Simulation({"a": engine})
    simulation.run(poisson(Random(1), 1.5 * best_rate(engine), 5.0, "a", "a"), until=5.0)
    assert simulation.rows["a"] / simulation.now >= 0.95 * best_rate(engine)


def test_throughput_at_saturation_with_all_students_at_once() -> None:
    engine = line(0.003, 0.006)
    rng = Random(2)
    arrivals = [
        one
        for steps in (1, 2, 4)
        for one in poisson(rng, best_rate(engine) / 3, 5.0, steps, f"{steps}", remaining=steps)
    ]
    simulation = Simulation({1: engine, 2: engine, 4: engine})
    simulation.run(arrivals, until=5.0)
    assert sum(simulation.rows.values()) / simulation.now >= 0.95 * best_rate(engine)


@pytest.mark.parametrize("warm", [True, False])
def test_two_models_share_the_worker_fairly_whatever_their_cost_and_their_load(warm: bool) -> None:
    rng = Random(3)
    simulation = Simulation({"small": line(0.001, 0.002), "large": line(0.01, 0.02)}, warm)
    small = poisson(rng, 300, 6.0, "small", "small", remaining=4)
    large = poisson(rng, 60, 6.0, "large", "large", remaining=2)
    simulation.run(small + large, until=6.0)
    shares = [simulation.busy_s[group] / simulation.now for group in ("small", "large")]
    assert shares == pytest.approx([0.5, 0.5], abs=0.08)


def test_a_trickle_is_not_held_up_by_a_flood() -> None:
    rng = Random(4)
    simulation = Simulation({"flood": line(0.003, 0.006), "trickle": line(0.003, 0.006)})
    flood = poisson(rng, 300, 5.0, "flood", "flood")
    trickle = poisson(rng, 10, 5.0, "trickle", "trickle")
    simulation.run(flood + trickle, until=5.0)
    waits = [simulation.done[one.job_id] - one.arrived for one in trickle if one.job_id in simulation.done]
    assert len(waits) >= len(trickle) - 2
    assert max(waits) <= 6 * line(0.003, 0.006)(MAX_ROWS)


def test_nothing_starves_and_priority_counts() -> None:
    """A flood of high priority, a little above what the worker can do: low ones wait their head start, not for ever."""
    rng = Random(5)
    engine = line(0.03, 0.06)
    simulation = Simulation({"a": engine})
    high = poisson(rng, 1.02 * best_rate(engine), 120.0, "a", "high", priority=1)
    low = poisson(rng, 0.3, 60.0, "a", "low", priority=-1)
    simulation.run(high + low)
    waits = [simulation.done[one.job_id] - one.arrived for one in low]
    behind = 2 * HEAD_START_S
    last = max(simulation.done[one.job_id] - one.arrived for one in high)
    assert max(waits) <= behind + last
    first = [simulation.done[one.job_id] - one.arrived for one in high if one.arrived < 20.0]
    assert max(first) < min(max(waits), 5.0)


def test_under_pressure_the_earliest_deadline_goes_first() -> None:
    """Rows that are in a hurry arrive behind others that are not: all are in time, where oldest first would fail."""
    simulation = Simulation({"a": line(0.01, 0.0)})
    patient = [Candidate(f"patient-{k:03}", 0, "a", 0.0, 100.0) for k in range(400)]
    hurried = [Candidate(f"hurried-{k:03}", 0, "a", 0.01, 1.0) for k in range(60)]
    simulation.run(patient + hurried)
    assert not simulation.given_up
    assert max(simulation.done[one.job_id] for one in hurried) <= 1.0


def test_overload_wastes_no_ticks_on_what_comes_too_late() -> None:
    rng = Random(6)
    engine = line(0.003, 0.006)
    simulation = Simulation({"a": engine})
    arrivals = poisson(rng, 3 * best_rate(engine) / 4, 5.0, "a", "a", timeout_s=1.0, remaining=4)
    simulation.run(arrivals)
    useful = 4 * sum(1 for one in arrivals if simulation.done.get(one.job_id, 1e9) <= one.deadline)
    assert useful / simulation.now >= 0.8 * best_rate(engine)
    early = [one for one in arrivals if simulation.given_up.get(one.job_id, 1e9) < one.deadline]
    assert len(early) >= 0.9 * len(simulation.given_up)


def test_a_lone_row_runs_at_once_and_alone() -> None:
    simulation = Simulation({"a": line(0.003, 0.006)})
    simulation.run([Candidate("a", 0, "a", 1.0, 100.0, remaining=4)])
    assert [at for at, _ in simulation.ticks] == pytest.approx([1.0 + k * 0.009 for k in range(4)])


@pytest.mark.parametrize("timeouts", [(5.0,), (3.0, 5.0, 20.0)])
@pytest.mark.parametrize("load", [1.5, 10.0])
def test_what_the_door_lets_in_is_in_time_whatever_its_priority_and_its_student(
    load: float, timeouts: tuple[float, ...]
) -> None:
    rng = Random(7)
    engine = line(0.02, 0.04)
    simulation = Simulation({1: engine, 2: engine, 4: engine}, door=Door(100_000))
    arrivals = [
        one
        for steps in (1, 2, 4)
        for priority in (-1, 0, 1)
        for timeout_s in timeouts
        for one in poisson(
            rng,
            load * best_rate(engine) / (9 * steps * len(timeouts)),
            30.0,
            steps,
            f"{steps}{priority}{timeout_s}",
            timeout_s,
            priority=priority,
            remaining=steps,
        )
    ]
    simulation.run(arrivals, until=30.0)
    late = [one for one in arrivals if simulation.done.get(one.job_id, 0.0) > one.deadline]
    assert len(simulation.given_up) + len(late) <= 0.01 * len(simulation.done)
    assert sum(simulation.rows.values()) / simulation.now >= 0.8 * best_rate(engine)
