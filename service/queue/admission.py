"""Who is let into a queue, and when the others should come back. Pure policy: time is an argument.

The scripts `submit` and `settle` of the Redis queue do the same with the same constants.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from service.jobs import Priority

MARGIN = 2.0
"""What is let in should be done in its time limit divided by this, at the speed measured so far."""

EXPECTED = 0.5
"""The part of a warm-up's speed that is counted on until there is a measurement: requests are more than their ticks."""

NEWCOMERS = 0.5
"""The part of the room that newcomers may fill. The rest is for those who come back when they were told to.

Of the bound on what waits a step of priority doubles the part: a quarter for low, all of it for high.
"""

BESIDE = 0.75
"""The part of the other models' work that takes room. All of it would leave each of many too little for full ticks."""

PACE = 0.5
"""The part of the measured speed that is promised: so promises are kept also where it falls a little."""

SHORTEST_S = 1.0
"""The least that anybody is told to wait."""

FARTHEST_S = 600.0
"""The most that anybody is told to wait. Who would have to wait longer is promised nothing."""

KEPT_S = 60.0
"""How late one may come back and still find the promise."""

MOST_PROMISES = 16384
"""Promises that are kept in mind at once."""

RATE_MEMORY_S = 10.0
EXPECTATION_S = 1.0
EXPECTED_COST = 100.0
SURPRISE = 3.0
SHORT_STALL_S = 1.0
BUSY_S = 0.25


def expectation(per_second: float) -> tuple[float, float]:
    """What a warm-up's speed counts as: row-ticks, and in how many seconds. A high one counts for less time."""
    cost = EXPECTED * per_second * EXPECTATION_S
    excess = max(1.0, cost / EXPECTED_COST)
    return cost / excess, EXPECTATION_S / excess


class Throughput:
    """How fast work is finished, in row-ticks a second, forgetting over about ``memory_s`` seconds of work.

    Only time in which there was work for ``BUSY_S`` and more counts: a lone request, whose ticks are nearly empty,
    shows how long one takes and not how many could be made. How much work that is goes by the speed itself, which may
    be far too high. So any work is enough where for that long, whenever something was finished, as much waited as
    workers had, and four times what was finished: they had no room for it. And time counts too in which a worker always
    had images to finish, where it shows a lower speed: behind their ticks they are finished one by one, however many
    there are.

    Of that time a pause does not count, from when something was finished until a worker began what is finished next: a
    bundle that loads, or a worker that starts anew, is no new speed. Where another job was worked on meanwhile, its
    part of the pause counts when that one is finished.

    A pause counts like work where it is shorter than ``SHORT_STALL_S``, or longer than the time since the last one that
    did not: so where pauses recur, about half of the time counts at least, and for the rest there is `MARGIN`. An
    interval is cut where all the work should have been done thrice over by then.
    """

    def __init__(self, memory_s: float = RATE_MEMORY_S) -> None:
        self._memory_s = memory_s
        self._cost = 0.0
        self._seconds = 0.0
        self._alone_s = 0.0
        self._since: float | None = None
        self._busy_since: float | None = None
        self._pause = (-math.inf, -math.inf)

    @property
    def per_second(self) -> float:
        """Row-ticks a second, 0 while nothing is known."""
        return self._cost / self._seconds if self._seconds > 0 else 0.0

    @property
    def alone_per_second(self) -> float:
        """Row-ticks a second while the workers are at nothing else, 0 while nothing is known."""
        return self._cost / self._alone_s if self._alone_s > 0 else 0.0

    def expect(self, per_second: float) -> None:
        """Start from what the first warm-up has shown, unless something was measured."""
        if self._seconds == 0:
            self._cost, self._seconds = expectation(per_second)
            self._alone_s = self._seconds

    def begin(self, now: float) -> None:
        """There is work from now on."""
        self._since = now

    def finished(
        self,
        cost: float,
        outstanding: float,
        worked_s: float,
        now: float,
        share: float = 1.0,
        finishing_s: float = 0.0,
        waiting: float = 0.0,
    ) -> None:
        """``cost`` of the ``outstanding`` work was finished, by a worker that was at it for ``worked_s``.

        Since something was, the workers were at this work for a ``share`` of the time. Of ``worked_s`` the last
        ``finishing_s`` are those behind its ticks. Of the work ``waiting`` is still to be given to a worker.
        """
        if self._since is None:
            return
        never_idle = finishing_s >= max(BUSY_S, now - self._since)
        is_busy = self._busy_for(waiting >= max(4 * cost, outstanding - waiting), now) >= BUSY_S
        alone_s = share * self._elapsed(self._since, now - max(worked_s, BUSY_S), now)
        self._since = now
        if (speed := self.alone_per_second) > 0:
            enough = 0.0 if is_busy else BUSY_S * speed
            if outstanding < enough and not (never_idle and cost < speed * alone_s):
                return
            alone_s = min(alone_s, max(SHORT_STALL_S, SURPRISE * outstanding / speed))
        elapsed = alone_s / share
        kept = math.exp(-elapsed / self._memory_s)
        self._cost = self._cost * kept + cost
        self._seconds = self._seconds * kept + elapsed
        self._alone_s = self._alone_s * kept + alone_s

    def end(self) -> None:
        """There is no more work."""
        self._since = self._busy_since = None

    def _busy_for(self, busy: bool, now: float) -> float:
        """The seconds for which workers had no room for it whenever something was finished, and have none now."""
        if not busy:
            self._busy_since = None
        elif self._busy_since is None:
            self._busy_since = now
        return now - self._busy_since if self._busy_since is not None else 0.0

    def _elapsed(self, since: float, began: float, now: float) -> float:
        """The seconds that count now, where something was finished ``since``, and what is finished now ``began``."""
        paused, resumed = self._pause
        if began - since > SHORT_STALL_S and began - since <= since - resumed:
            self._pause = (since, began)
            return now - began
        worked_on = max(0.0, resumed - max(paused, began))
        self._pause = (paused, resumed - worked_on)
        return max(0.0, now - since) + worked_on


class Door:
    """Lets in what will be done in time behind what goes before it, and promises the others a time to come back.

    Before it goes what workers have, and what waits with the same priority or a higher one. Workers are as long at the
    work of each model that has some: so what others have takes room too, as far as it is done until then.

    Newcomers may fill a part of the room: of the bound on what waits, and of what can be done within the time limit.
    One who is refused is given the next time at which its work can be done if all who were refused before, with its
    priority or a higher one, come back at theirs. Who does is recognised, and may fill all the room; so a promise is
    kept while the overload lasts, unless more of a higher priority comes meanwhile. Where they stay away nothing is
    lost, as newcomers have their part in any case.

    A request that is refused again before its time is told the rest of it, and gains nothing.
    """

    def __init__(self, max_cost: int, doors: Collection[Door] = ()) -> None:
        """Let at most ``max_cost`` row-ticks wait, or one job that is dearer.

        ``doors`` are those of all models, which share the workers.
        """
        self._max_cost = max_cost
        self._doors = doors
        self._promises: dict[str, float] = {}
        self._next_promise = dict.fromkeys(Priority, -math.inf)
        self._waiting = dict.fromkeys(Priority, 0)
        self.outstanding = 0
        self.throughput = Throughput()

    def knock(
        self, identity: str, cost: int, left_s: float, now: float, priority: Priority = Priority.NORMAL
    ) -> float | None:
        """None lets ``cost`` in, with ``left_s`` to its deadline; else it should come back after so many whole seconds.

        ``identity`` recognises what comes again, "" does not.
        """
        wait_s = self.ask(identity, cost, left_s, now, priority)
        if wait_s is None:
            self._promises.pop(identity, None)
            self._let_in(cost, now, priority)
        return wait_s

    def ask(
        self, identity: str, cost: int, left_s: float, now: float, priority: Priority = Priority.NORMAL
    ) -> float | None:
        """What `knock` would say now. It lets nothing in; a time that it tells is promised as there."""
        self._forget_old(now)
        due = self._promises.get(identity)
        in_turn = due is not None and due <= now
        missing_s = self._missing_s(cost, left_s, 1.0 if in_turn else NEWCOMERS, priority)
        if missing_s <= 0:
            return None
        if due is not None and not in_turn:
            return math.ceil(due - now)
        return self._promise(identity, cost, now, now + max(SHORTEST_S, missing_s), priority)

    @property
    def waiting(self) -> int:
        """Row-ticks that wait, of every priority."""
        return sum(self._waiting.values())

    @property
    def backlog_s(self) -> float:
        """Seconds until all that was let in is done, 0 while that is not known."""
        speed = self.throughput.per_second
        return self.outstanding / speed if speed > 0 else 0.0

    def took(self, cost: int, priority: Priority = Priority.NORMAL) -> None:
        """``cost`` that waited was given to a worker."""
        self._waiting[priority] -= cost

    def withdrew(self, cost: int, priority: Priority = Priority.NORMAL) -> None:
        """``cost`` that waited is not wanted any more."""
        self._waiting[priority] -= cost
        self._ended(cost)

    def settled(self, cost: int, worked_s: float | None, now: float, finishing_s: float = 0.0) -> None:
        """``cost`` that a worker had is over, finished in ``worked_s``; None where it is not finished.

        Of these the last ``finishing_s`` are those behind its ticks.
        """
        if worked_s is not None:
            self.throughput.finished(cost, self.outstanding, worked_s, now, self._share(), finishing_s, self.waiting)
        self._ended(cost)

    def _let_in(self, cost: int, now: float, priority: Priority) -> None:
        if self.outstanding == 0:
            # Nobody came for a while: what was promised for later hinders nobody.
            self._next_promise = dict.fromkeys(Priority, now)
            self.throughput.begin(now)
        self._waiting[priority] += cost
        self.outstanding += cost

    def _ended(self, cost: int) -> None:
        self.outstanding -= cost
        if self.outstanding == 0:
            self.throughput.end()

    def _missing_s(self, cost: int, left_s: float, share: float, priority: Priority) -> float:
        """Seconds until there is room if nobody else comes, not above 0 where there is now.

        Where nothing goes before it there is time for everything: an estimate that is wrong locks nobody out.
        """
        bound = min(1.0, share * 2.0**priority) * self._max_cost
        over = self.waiting + cost - bound if self.waiting > 0 else 0.0
        if self.throughput.alone_per_second == 0:
            return SHORTEST_S if over > 0 else 0.0
        before = self.outstanding - sum(self._waiting[other] for other in Priority if other < priority)
        own_s = self._alone_s(before + cost)
        room_s = left_s / MARGIN - BESIDE * self._beside_s(own_s)
        late_s = own_s - share * room_s if before > 0 else 0.0
        return self._shared_s(max(self._alone_s(over), late_s))

    def _alone_s(self, cost: float) -> float:
        """Seconds in which so much is done while there is no other model's work, 0 while that is not known."""
        speed = self.throughput.alone_per_second
        return cost / speed if speed > 0 else 0.0

    def _beside_s(self, own_s: float) -> float:
        """Seconds that go to other models until ``own_s`` were for this one: as many to each, or all that it needs."""
        return sum(min(own_s, door._alone_s(door.outstanding)) for door in self._doors if door is not self)

    def _shared_s(self, own_s: float) -> float:
        """Seconds until ``own_s`` were for this model."""
        return own_s + self._beside_s(own_s)

    def _share(self) -> float:
        """The part of the workers' time that is for this model now."""
        own_s = self._alone_s(self.outstanding)
        return own_s / self._shared_s(own_s) if own_s > 0 else 1.0

    def _promise(self, identity: str, cost: int, now: float, earliest: float, priority: Priority) -> float:
        """The whole seconds to the time that is promised."""
        at = max(self._next_promise[priority], earliest)
        wait_s = math.ceil(at - now)
        self._promises.pop(identity, None)
        if not identity or wait_s > FARTHEST_S or len(self._promises) >= MOST_PROMISES:
            return min(wait_s, FARTHEST_S)
        self._promises[identity] = now + wait_s
        if (own_s := self._alone_s(cost)) > 0:
            behind = at + self._shared_s(own_s) / PACE
            for other in Priority:
                if other <= priority:
                    self._next_promise[other] = max(self._next_promise[other], behind)
        return wait_s

    def _forget_old(self, now: float) -> None:
        """Drop promises that nobody came for. They lie nearly in the order of their times."""
        while self._promises:
            identity, due = next(iter(self._promises.items()))
            if due + KEPT_S > now:
                return
            del self._promises[identity]
