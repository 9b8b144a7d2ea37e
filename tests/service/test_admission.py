"""The door of the queue, in simulated time: who is let in is done in time, and who comes back as told is let in."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.pipeline import Generate
from service.jobs import Finished, Job, Output, Priority, Timings
from service.queue.admission import EXPECTED, FARTHEST_S, MOST_PROMISES, PACE, Door, Throughput
from service.queue.base import QueueFull
from service.queue.memory import MemoryQueue

SPEED = 100.0
LIMIT_S = 10.0
COSTS = (1, 2, 4, 8, 16)
MEAN_COST = sum(COSTS) / len(COSTS)


@dataclass
class Overload:
    """One worker that does a job after the other, and clients of whom each refused one may come back when told to.

    In its ``pauses`` it begins nothing.
    """

    returns: float = 1.0
    speed: Callable[[float], float] = lambda now: SPEED
    pauses: Sequence[tuple[float, float]] = ()
    limit_s: float = LIMIT_S
    seed: int = 1
    max_cost: int = 100_000
    late: list[float] = field(default_factory=list)
    served: float = 0.0
    back: Counter[bool] = field(default_factory=Counter)
    speeds: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = Random(self.seed)
        self.door = Door(self.max_cost)
        self.door.throughput.expect(SPEED / EXPECTED)
        self.line: deque[tuple[float, int]] = deque()
        self.done_at = self.worked_s = 0.0

    def run(self, load: float, seconds: float) -> None:
        """Poisson arrivals at ``load`` times what the worker can do."""
        numbers = itertools.count()
        arrivals = itertools.accumulate(
            self.rng.expovariate(load * SPEED / MEAN_COST) for _ in range(int(load * seconds * SPEED / MEAN_COST))
        )
        coming = [(at, next(numbers), self.rng.choice(COSTS), 0) for at in arrivals]
        while coming and coming[0][0] < seconds:
            now, number, cost, told = heapq.heappop(coming)
            self._work_until(now)
            wait_s = self.door.knock(f"{number}", cost, self.limit_s, now)
            self.back[wait_s is None] += told
            if wait_s is None:
                self._enter(cost, now)
            elif self.rng.random() < self.returns:
                heapq.heappush(coming, (now + wait_s + self.rng.uniform(0.0, 0.05), number, cost, 1))
        self.used = self.served / (SPEED * seconds)

    def _enter(self, cost: int, now: float) -> None:
        if not self.line:
            self.done_at = self._done_at(cost, now)
        self.line.append((now, cost))

    def _work_until(self, now: float) -> None:
        while self.line and self.done_at <= now:
            arrived, cost = self.line.popleft()
            self.door.took(cost)
            self.door.settled(cost, self.worked_s, self.done_at)
            self.speeds.append((self.done_at, self.door.throughput.per_second))
            self.served += cost
            if self.done_at - arrived > self.limit_s:
                self.late.append(self.done_at)
            if self.line:
                self.done_at = self._done_at(self.line[0][1], self.done_at)

    def _done_at(self, cost: int, now: float) -> float:
        begins = max(now, next((end for begin, end in self.pauses if begin <= now < end), now))
        self.worked_s = cost / self.speed(begins) * self.rng.uniform(0.7, 1.3)
        return begins + self.worked_s


@pytest.mark.parametrize("limit_s", [4.0, 10.0, 30.0])
@pytest.mark.parametrize("load", [2.0, 10.0])
def test_who_comes_back_as_told_is_let_in_and_nobody_is_late(load: float, limit_s: float) -> None:
    overload = Overload(limit_s=limit_s)
    overload.run(load, 120.0)
    assert not overload.late
    assert sum(overload.back.values()) > 500
    assert overload.back[False] <= 0.01 * overload.back[True]
    assert overload.used >= 0.95


@pytest.mark.parametrize("returns", [0.0, 0.05, 0.5])
def test_capacity_is_used_also_where_few_come_back(returns: float) -> None:
    overload = Overload(returns)
    overload.run(10.0, 120.0)
    assert not overload.late
    assert overload.back[False] <= 0.01 * overload.back[True]
    assert overload.used >= 0.95


def test_below_capacity_nobody_is_refused() -> None:
    overload = Overload()
    overload.run(0.8, 120.0)
    assert not overload.late
    assert sum(overload.back.values()) == 0


def test_a_worker_that_turns_half_as_fast_is_followed() -> None:
    overload = Overload(speed=lambda now: SPEED if now < 40 else SPEED / 2)
    overload.run(10.0, 120.0)
    assert max(overload.late, default=0.0) < 40 + 3 * LIMIT_S
    # What was promised before was too much by half; each such promise is broken once.
    assert overload.back[False] <= 0.5 * overload.back[True]
    assert overload.used >= 0.95 * (40 + 80 / 2) / 120


def test_lone_requests_are_no_measure_of_what_many_could_have() -> None:
    door = Door(1000)
    door.throughput.expect(SPEED / EXPECTED)
    for turn in range(1000):
        assert door.knock("", 1, LIMIT_S, turn) is None
        door.took(1)
        door.settled(1, 0.1, turn + 0.1)  # a tenth of the speed, with ticks of one row
    assert door.throughput.per_second == SPEED
    assert all(door.knock("", 4, LIMIT_S, 1000.0) is None for _ in range(60))


def test_images_that_are_finished_far_slower_than_their_ticks_are_measured() -> None:
    """Ticks take nothing, and each image a tenth of a second behind them. A quarter more come than that allows."""
    door, free_at, late, refused = Door(100_000), 0.0, 0, 0
    door.throughput.expect(1e5)
    line: deque[tuple[float, float]] = deque()
    for now in (0.08 * k for k in range(1500)):
        while line and line[0][1] <= now:
            arrived, done_at = line.popleft()
            door.settled(4, done_at - arrived, done_at, done_at - arrived)
            late += done_at - arrived > LIMIT_S
        if door.knock("", 4, LIMIT_S, now) is not None:
            refused += 1
            continue
        door.took(4)
        free_at = max(free_at, now) + 0.1
        line.append((now, free_at))
    assert late == 0
    assert refused == pytest.approx(300, rel=0.2)
    assert door.throughput.per_second == pytest.approx(40, rel=0.1)


@pytest.mark.parametrize(
    ("believed", "tick_s", "limit_s", "offered", "slow_from"),
    [
        (20000, 0.032, 2.0, 600, 0.0),
        (32000, 0.032, 2.0, 2000, 5.0),
        (40000, 0.02, 1.0, 1600, 0.0),
        (12000, 0.0267, 0.5, 1200, 0.0),
    ],
)
def test_a_speed_that_is_far_too_high_is_unlearnt_from_short_jobs(
    believed: float, tick_s: float, limit_s: float, offered: float, slow_from: float
) -> None:
    """Of four ticks of 16 rows, with the bound that there is by default: half of them are done in time at last."""
    door, now, came, done = Door(3072), 0.0, 0, 0
    door.throughput.expect(believed)
    line: deque[float] = deque()
    while now < 30:
        while came < now * offered / 4:
            at = came * 4 / offered
            came += 1
            if door.knock("", 4, limit_s, at) is None:
                line.append(at)
        while line and line[0] + limit_s < now:
            line.popleft()
            door.withdrew(4)
        batch = [line.popleft() for _ in range(min(len(line), 16))]
        for _ in batch:
            door.took(4)
        worked_s = 4 * (tick_s if now >= slow_from else 0.001) if batch else 0.001
        now += worked_s
        for at in batch:
            door.settled(4, worked_s, now)
            done += now > 15 and now - at <= limit_s
    assert done > 0.5 * 15 * 16 / (4 * tick_s)
    assert 0.5 < door.throughput.per_second * tick_s / 16 < 2.5


def test_a_light_load_of_long_jobs_is_no_measure() -> None:
    """Of 20 ticks each, a tenth of what ticks of 128 rows can do."""
    rng, now = Random(2), 0.0
    door = Door(10**9)
    speed = 128 / (0.02 + 128 * 3e-5)
    door.throughput.expect(speed / EXPECTED)
    jobs: deque[float] = deque()
    for _ in range(500):
        now += rng.expovariate(0.1 * speed / 20)
        while jobs and jobs[0] <= now:
            door.settled(20, 0.42, jobs.popleft())
        assert door.knock("", 20, 1.0, now) is None
        door.took(20)
        jobs.append(now + 0.42)
    assert door.throughput.per_second == pytest.approx(speed)


@pytest.mark.parametrize("lone_bursts", [0, 3])
def test_a_fast_device_with_a_short_limit_keeps_its_speed(lone_bursts: int) -> None:
    """Ticks take 5 ms and 20 us a row, of 256 rows; a whole batch is settled job by job."""
    door, now, served = Door(100_000), 0.0, 0
    door.throughput.expect(256 / 0.01012)
    for _ in range(lone_bursts):
        for _ in range(5):
            assert door.knock("", 4, 0.5, now) is None
            door.took(4)
        for _ in range(5):
            door.settled(4, 0.02, now + 0.02)
        now += 1.0
    line, offered, start = deque[float](), 0.0, now
    while now < start + 10:
        for _ in range(int((now - start) * 8000 - offered)):
            offered += 1
            if door.knock("", 4, 0.5, now) is None:
                line.append(now)
        batch = [line.popleft() for _ in range(min(len(line), 256))]
        for _ in batch:
            door.took(4)
        worked_s = 4 * (0.005 + 20e-6 * len(batch))
        now += worked_s
        for _ in batch:
            door.settled(4, worked_s, now)
        served += len(batch)
    assert served / 10 > 5500


@pytest.mark.parametrize("slow_from", [0, 200])
def test_a_speed_that_is_far_too_high_is_unlearnt(slow_from: int) -> None:
    """More jobs come than the worker can do within their limit; it is slow from the first, or later."""
    door, now = Door(100_000), 0.0
    door.throughput.expect(1e6)
    late: list[bool] = []
    line: deque[float] = deque()
    for turn in range(400):
        each_s = 0.8 if turn >= slow_from else 0.001
        while line and line[0] + LIMIT_S < now:
            line.popleft()
            door.withdrew(32)
        for _ in range(4):
            if door.knock("", 32, LIMIT_S, now) is None:
                line.append(now)
        if line:
            began = line.popleft()
            door.took(32)
            now += each_s
            door.settled(32, each_s, now)
            late.append(now - began > LIMIT_S)
    assert not any(late[-100:])
    assert door.throughput.per_second == pytest.approx(40, rel=0.5)


def test_a_pair_that_is_finished_one_behind_the_other_is_no_measure_of_ticks() -> None:
    door = Door(1000)
    door.throughput.expect(SPEED / EXPECTED)
    for turn in range(1000):
        for _ in range(2):
            assert door.knock("", 4, LIMIT_S, turn) is None
            door.took(4)
        for behind_s in (0.3, 0.31):
            door.settled(4, 0.5 + behind_s, turn + 0.5 + behind_s, behind_s)
    assert door.throughput.per_second == SPEED


def test_what_is_measured_while_there_is_enough_to_do_counts() -> None:
    door = Door(1000)
    door.throughput.expect(SPEED / EXPECTED)
    now = 0.0
    for _ in range(50):
        assert door.knock("", 20, 10 * LIMIT_S, now) is None
        assert door.knock("", 20, 10 * LIMIT_S, now) is None
        for _ in range(2):
            now += 2.0
            door.took(20)
            door.settled(20, 2.0, now)
    assert door.throughput.per_second == pytest.approx(10, rel=0.35)


def test_an_estimate_that_is_far_too_low_locks_nobody_out() -> None:
    door = Door(1000)
    door.throughput.expect(1e-3)
    for turn in range(100):
        assert door.knock("", 4, 10.0, float(turn)) is None
        door.took(4)
        door.settled(4, 0.1, turn + 0.1)
    assert door.knock("", 4, 10.0, 100.0) is None
    assert door.knock("", 4, 10.0, 100.0) is None


def test_what_is_promised_is_bounded_in_number_and_in_time() -> None:
    door = Door(8)
    door.throughput.expect(SPEED / EXPECTED)
    assert door.knock("first", 8, LIMIT_S, 0.0) is None
    waits = [door.knock(f"{k}", 8, LIMIT_S, 0.0) or 0.0 for k in range(MOST_PROMISES)]
    assert max(waits) == FARTHEST_S
    assert waits == sorted(waits)
    assert len(door._promises) < MOST_PROMISES


def test_who_knocks_all_the_time_is_told_the_same_time_and_hinders_nobody() -> None:
    door = Door(8)
    door.throughput.expect(1.0 / EXPECTED)
    assert door.knock("first", 8, 100.0, 0.0) is None
    told = door.knock("impatient", 4, 100.0, 0.0)
    assert told is not None
    for k in range(100):
        assert door.knock("impatient", 4, 100.0, k / 1000) == told
    other = door.knock("other", 4, 100.0, 0.1)
    assert other is not None
    assert other <= told + math.ceil(4 / PACE)


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0.01, 0.9)), min_size=1, max_size=30))
def test_the_throughput_lies_between_the_slowest_and_the_fastest_seen(events: list[tuple[int, float]]) -> None:
    throughput, now = Throughput(), 0.0
    throughput.begin(now)
    for cost, pause in events:
        now += pause
        throughput.finished(cost, 100.0, pause, now)
    speeds = [cost / pause for cost, pause in events]
    assert min(speeds) * 0.999 <= throughput.per_second <= max(speeds) * 1.001


def test_idle_time_does_not_count_as_slowness() -> None:
    door = Door(100)
    for begin in (0.0, 1000.0):
        door.knock("", 4, LIMIT_S, begin)
        door.took(4)
        door.settled(4, 1.0, begin + 1.0)
    assert door.throughput.per_second == pytest.approx(4.0)


def test_a_stall_is_no_new_speed() -> None:
    throughput = Throughput()
    throughput.expect(SPEED / EXPECTED)
    throughput.begin(0.0)
    throughput.finished(SPEED, SPEED, 300.0, 300.0)
    assert throughput.per_second >= 0.3 * SPEED


@pytest.mark.parametrize("taken_first", [False, True])
def test_the_load_of_a_bundle_is_no_new_speed(taken_first: bool) -> None:
    """Jobs wait 10 s for a worker, or for the bundle in one: as many are let in behind them as if they had not."""
    let_in = [_let_in_behind_a_load_of(load_s, taken_first) for load_s in (0.0, 10.0)]
    assert let_in[0] == let_in[1] > 15


def _let_in_behind_a_load_of(load_s: float, taken_first: bool) -> int:
    now, tasks = 0.0, (Generate("", 4, 0.0, 0),) * 4
    queue = MemoryQueue(100_000, lambda: now)
    taken: list[Job] = []

    def let_in(name: str) -> bool:
        try:
            asyncio.run(queue.submit(Job(name, "", tasks, Output("png"), now, now + 30.0, "model")))
        except QueueFull:
            return False
        return True

    assert all(let_in(f"first {k}") for k in range(6))
    if taken_first:
        taken = queue.take({"model": 100}, 0.0)
    now += load_s
    queue.expect("model", 40.0)
    for job in taken or queue.take({"model": 100}, 0.0):
        now += 0.4
        queue.settle(job.id, Finished((), Timings(now - 0.4, 0.1, 0.2, 0.1), ()))
    return sum(let_in(f"newcomer {k}") for k in range(100))


def test_while_nothing_is_worked_on_nothing_is_measured() -> None:
    overload = Overload(pauses=((0.0, 10.0), (60.0, 75.0)))
    overload.run(2.0, 120.0)
    assert min(speed for _, speed in overload.speeds) >= 0.8 * SPEED
    assert max(speed for _, speed in overload.speeds) <= 1.25 * SPEED


def test_a_worker_that_turns_slow_behind_a_pause_is_followed() -> None:
    overload = Overload(speed=lambda now: SPEED if now < 50 else SPEED / 4, pauses=((40.0, 50.0),))
    overload.run(2.0, 120.0)
    assert all(speed <= 0.5 * SPEED for at, speed in overload.speeds if at > 50 + 2 * LIMIT_S)
    assert max(overload.late, default=0.0) < 50 + 5 * LIMIT_S


def test_a_worker_that_pauses_all_the_time_is_slower() -> None:
    """Of every 12 s it works for 3."""
    overload = Overload(pauses=[(begin, begin + 9.0) for begin in range(20, 200, 12)])
    overload.run(2.0, 200.0)
    late = [speed for at, speed in overload.speeds if at > 60]
    assert max(late) <= 2 * SPEED / 4 * 1.25


def test_a_job_that_was_worked_on_behind_others_counts_for_as_long() -> None:
    throughput = Throughput(math.inf)
    throughput.begin(0.0)
    for begin in (0.0, 100.0):
        throughput.finished(1.0, 1e6, 1.0, begin + 20.0)  # by another worker, which had nothing else to do
        throughput.finished(1.0, 1e6, 1.0, begin + 40.0)
        throughput.finished(98.0, 1e6, 100.0, begin + 100.0)
    assert throughput.per_second == pytest.approx(1.0)


@given(st.lists(st.tuples(st.floats(0.01, 30.0), st.floats(0.0, 60.0)), min_size=2, max_size=30))
def test_no_time_counts_twice_and_at_least_half_counts_behind_the_first_pause(jobs: list[tuple[float, float]]) -> None:
    """Jobs by the time since the last one was finished, and the time for which they were worked on."""
    throughput, now = Throughput(math.inf), 0.0
    throughput.begin(now)
    for gap, worked_s in jobs:
        now += gap
        throughput.finished(1.0, 1e9, worked_s, now)
    assert throughput._seconds <= now * 1.001 + 1e-9
    assert throughput._seconds >= (now - max(gap for gap, _ in jobs)) / 2 * 0.999 - 1e-9


def test_all_that_low_priority_asks_for_locks_nobody_out_and_nobody_is_late() -> None:
    """Jobs of 40 row-ticks that may take ten minutes, as many as are let in; beside them requests at half the speed."""
    now, late, refused, served, numbers, rng = 0.0, 0, 0, 0, itertools.count(), Random(1)
    queue = MemoryQueue(100_000, lambda: now)
    queue.expect("model", SPEED / EXPECTED)

    def let_in(images: int, limit_s: float, priority: Priority) -> bool:
        tasks = (Generate("", 4, 0.0, 0),) * images
        job = Job(f"{next(numbers)}", "", tasks, Output("png"), now, now + limit_s, "model", priority=priority)
        try:
            asyncio.run(queue.submit(job))
        except QueueFull:
            return False
        return True

    arrival = 0.0
    while now < 150.0:
        while arrival <= now:
            refused += not let_in(1, LIMIT_S, Priority.NORMAL)
            arrival += rng.expovariate(0.5 * SPEED / 4)
        while let_in(10, 600.0, Priority.LOW):
            pass
        [job] = queue.take({"model": 1}, 0.0)
        now += job.cost / SPEED
        late += now > job.deadline
        served += job.priority is Priority.NORMAL
        queue.settle(job.id, Finished((), Timings(0, 0, 0, 0), ()))
    assert (late, refused) == (0, 0)
    assert served > 0.45 * 150.0 * SPEED / 4


@pytest.mark.parametrize("models", [1, 4, 8])
def test_a_burst_for_several_models_on_one_worker_is_done_in_time(models: int) -> None:
    """Up to four jobs of a model share four ticks of a tenth of a second; the models take turns."""
    now, numbers, names = 0.0, itertools.count(), [f"model {k}" for k in range(models)]
    queue = MemoryQueue(100_000, lambda: now)

    def let_in(model: str, limit_s: float) -> bool:
        job = Job(f"{next(numbers)}", "", (Generate("", 4, 0.0, 0),), Output("png"), now, now + limit_s, model)
        try:
            asyncio.run(queue.submit(job))
        except QueueFull:
            return False
        return True

    def work() -> float:
        """Do all there is. The most of its limit that a job has used then."""
        nonlocal now
        used, held = [0.0], {name: _Batch() for name in names}
        while any(queue.owes(name) for name in names):
            for name, batch in held.items():
                if not batch.jobs:
                    batch = held[name] = _Batch(queue.take({name: 4}, 0.0), now)
                if batch.jobs:
                    now, batch.ticks = now + 0.1, batch.ticks + 1
                if batch.ticks == 4:
                    timings = Timings(0.0, 0.0, now - batch.begun, 0.0)
                    for job in batch.jobs:
                        queue.settle(job.id, Finished((), timings, ()))
                        used.append((now - job.submitted) / (job.deadline - job.submitted))
                    held[name] = _Batch()
        return max(used)

    for name in names:
        queue.expect(name, 4 / 0.1)
        assert all(let_in(name, 60.0) for _ in range(24))
        work()
    count = sum(let_in(name, 8.0) for _ in range(100) for name in names)
    assert count >= 16  # A quarter of the limit, as one model has.
    assert work() <= 0.8


@dataclass
class _Batch:
    jobs: list[Job] = field(default_factory=list)
    begun: float = 0.0
    ticks: int = 0
