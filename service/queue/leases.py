"""The worker's side of the Redis queue: what this process was given and has not settled."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, TypeVar

from service.jobs import EXPIRED, Failed, Finished, Job, Outcome, Priority
from service.queue import keys
from service.queue.addresses import LONGEST_BLOCK_S
from service.queue.admission import BUSY_S, RATE_MEMORY_S, SHORT_STALL_S, SURPRISE, expectation
from service.queue.base import HEAD_START_S, LATE_S, PATIENCE_S, WATCHED_S, Bounds, finishing_s, state_after, worked_s
from service.queue.clients import AWAY, Arguments, ThreadsRedis
from service.queue.keys import RESULT_TTL_S, SPEED_TTL_S, milliseconds
from service.queue.wire import pack_outcome, request_of, unpack_job
from service.telemetry.logs import describe

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

MAX_TRIES = 3
_DEAD_LETTER_TTL_S = 7 * 24 * 3600.0
_FORGOTTEN_AFTER_S = 3600.0
_BEATS_PER_SILENCE = 5
_LONGEST_BEAT_S = 1.0
_BEATS_PER_REMINDER = 10
_AFTER_ERROR_S = 0.5

_THROUGHPUT: Arguments = [
    *(str(RATE_MEMORY_S), str(SHORT_STALL_S), str(SURPRISE), milliseconds(SPEED_TTL_S)),
    str(BUSY_S),
]
"""What `settle` reckons speeds with, as service/queue/admission.py does."""

_TOO_MANY_TRIES = Failed("engine", f"the request was tried {MAX_TRIES} times, and its worker died each time")
_UNREADABLE = Failed("engine", "the workers cannot read the request")


@dataclass(frozen=True, slots=True)
class Lease:
    """A job that this process was given: its entry in a stream of its model, at which try, if it is kept.

    ``deadline`` is on this process's clock, once the job was read.
    """

    job_id: str
    model: str
    stream: str
    entry: bytes
    tries: int
    kept: bool
    deadline: float = math.inf


class Leases:
    """Takes jobs, says with every beat of a thread of its own that it still has them, and settles them.

    Where Redis is away its methods do nothing, and outcomes are kept until it is back.
    """

    def __init__(
        self,
        redis: ThreadsRedis,
        reclaim_after_s: float,
        bounds: Bounds,
        on_redelivery: Callable[[], None],
        on_dead_letter: Callable[[], None],
        on_late_outcome: Callable[[Outcome], None],
    ) -> None:
        self._redis = redis
        self._reclaim_after_s = reclaim_after_s
        self._bounds = bounds
        self._on_redelivery = on_redelivery
        self._on_dead_letter = on_dead_letter
        self._on_late_outcome = on_late_outcome
        self._consumer = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._models: set[str] = set()
        self._changed = threading.Condition()
        self._held: dict[str, Lease] = {}
        self._unsent: dict[str, tuple[Lease, Outcome, str]] = {}
        self._expected: dict[str, float] = {}
        self._away_until: float | None = None
        self._failures = 0
        self._noting = threading.Lock()  # Several threads find out at once: only one of them says so.
        self._reclaims_from = 0.0
        self._taking = threading.Lock()  # one at a time: what is given is held before it is asked for again
        self._closing = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="leases", daemon=True)

    def take(self, rooms: Mapping[str, int], wait_s: float, refused: Collection[str]) -> list[Job]:
        """See JobQueue.take."""
        until = time.monotonic() + wait_s
        self._begin(rooms)
        while True:
            taken: list[Job] = []
            seen: dict[str, bytes] = {}
            with self._taking:
                if not self._has_one_alone():
                    seen = self._reach(partial(self._take, rooms, refused, taken), seen)
            left_s = until - time.monotonic()
            if taken or left_s <= 0:
                return taken
            self._wait(seen, left_s)

    def pass_on(self, job_id: str) -> bool:
        """See JobQueue.pass_on."""
        with self._changed:
            lease = self._held.get(job_id)
            if lease is None or job_id in self._unsent:
                return False
        names = [lease.stream, keys.load(lease.model), keys.record(job_id)]
        passed = bool(self._reach(partial(self._redis.run, "pass_on", names, [self._consumer, lease.entry]), 0))
        if passed:
            self._let_go(job_id)
        return passed

    def expect(self, model: str, per_second: float) -> None:
        """See JobQueue.expect."""
        with self._changed:
            self._expected[model] = per_second
        self._remind()

    def cancelled(self, job_ids: Iterable[str]) -> set[str]:
        """See JobQueue.cancelled. Among them are jobs that another worker has settled meanwhile.

        A job that waits is none of them: Redis came back without what it had given.
        """
        with self._changed:
            held = [job_id for job_id in job_ids if job_id in self._held and job_id not in self._unsent]
        if not held:
            return set()
        unknown: list[bytes | None] = [b"running"] * len(held)
        states = self._reach(
            partial(self._redis.run, "states", [keys.record(job_id) for job_id in held]), unknown, writes=False
        )
        return {job_id for job_id, state in zip(held, states, strict=True) if state not in (b"running", b"queued")}

    def progress(self, done: Mapping[str, int]) -> set[str]:
        """See JobQueue.progress."""
        with self._changed:
            held = {job_id: self._held[job_id] for job_id in done if job_id in self._held}
        kept = [job_id for job_id, lease in held.items() if lease.kept]
        if not kept:
            return set()
        names = [keys.record(job_id) for job_id in kept]
        unknown = [0] * len(kept)
        watched = self._reach(partial(self._redis.run, "progress", names, [done[job_id] for job_id in kept]), unknown)
        return {job_id for job_id, wanted in zip(kept, watched, strict=True) if wanted}

    def show(self, job_id: str, preview: bytes) -> None:
        """See JobQueue.show."""
        with self._changed:
            held = job_id in self._held
        if held:
            keep = milliseconds(WATCHED_S)
            self._reach(partial(self._redis.run, "show", [keys.preview(job_id)], [preview, keep]), None)

    def settle(self, job_id: str, outcome: Outcome) -> Outcome | None:
        """See JobQueue.settle."""
        with self._changed:
            lease = self._held.get(job_id)
            if lease is None or job_id in self._unsent:
                return None
        answer: int | None = self._reach(partial(self._settle, lease, outcome), None)
        if answer is None:
            with self._changed:
                self._unsent[job_id] = lease, outcome, ""
            return None
        return _what_became(answer, outcome, outcome)

    def owes(self, model: str) -> bool:
        """See JobQueue.owes."""
        streams = [keys.jobs(model, priority) for priority in Priority]
        return self._reach(lambda: any(self._redis.client.xlen(stream) for stream in streams), True, writes=False)

    def close(self) -> None:
        """Hand over what is left, and leave the groups of workers."""
        self._closing.set()
        if self._beating.ident is None:
            return
        self._beating.join()
        if self._away_until is not None:
            self._away_until = time.monotonic()  # A last try, whatever the pause.
        self._send()
        self._sweep()

    def _begin(self, models: Collection[str]) -> None:
        with self._changed:
            self._models.update(models)
            if self._beating.ident is None:
                self._beating.start()

    def _has_one_alone(self) -> bool:
        """Whether a job is held that was handed out again: nothing comes beside it."""
        with self._changed:
            return any(lease.tries > 1 for lease in self._held.values())

    def _take(self, rooms: Mapping[str, int], refused: Collection[str], taken: list[Job]) -> dict[str, bytes]:
        """Append what there is to ``taken``. Returns the last entry given of each stream, none where to pause."""
        with self._changed:
            holding = list(self._held)
        models = sorted(rooms)
        lines = list(product(models, Priority))
        streams = [keys.jobs(model, priority) for model, priority in lines]
        loads, speeds = ([name(model) for model, _ in lines] for name in (keys.load, keys.speed))
        head_starts = [milliseconds(HEAD_START_S * priority) for _, priority in lines]
        # After an outage everybody seems silent; those that live get the time to say so.
        patient = self._away_until is not None or time.monotonic() < self._reclaims_from
        silence = milliseconds(_FORGOTTEN_AFTER_S if patient else self._reclaim_after_s)
        numbers = [models.index(model) + 1 for model, _ in lines]
        room = [rooms[model] for model in models]
        patience = [milliseconds(PATIENCE_S) if model in refused else 0 for model in models]
        # With what is held, always: where an answer is lost, redis-py asks again with the same arguments.
        arguments: Arguments = [self._consumer, silence, json.dumps(holding), *head_starts, *numbers, *room, *patience]
        now, given, seen = self._redis.run("take", [*streams, *loads, *speeds], arguments)
        # The times of a job are on Redis' clock; only durations are carried over to this host's own.
        offset_s = time.monotonic() - now / 1000
        for stream, entry, job_id, message, submitted, deadline, tries, kept in given:
            model, _ = lines[stream - 1]
            lease = Lease(job_id.decode(), model, streams[stream - 1], entry, tries, bool(kept))
            job = self._read(lease, message, offset_s, submitted, deadline)
            if job is not None:
                taken.append(job)
        return dict(zip(streams, seen, strict=False))

    def _read(
        self, lease: Lease, message: bytes, offset_s: float, submitted: bytes | int, deadline: bytes | int
    ) -> Job | None:
        """The job of a lease, held from now on; None where it was given up, or is held: Redis had lost that."""
        with self._changed:
            if lease.job_id in self._held or lease.job_id in self._unsent:
                return None
        if lease.tries > MAX_TRIES:
            self._give_up(lease, _TOO_MANY_TRIES, request_of(message))
            return None
        try:
            begins, ends = (offset_s + int(time) / 1000 for time in (submitted, deadline))
            job = unpack_job(message, lambda: self._images(lease), begins, ends)
        except AWAY:
            raise
        except Exception as error:  # whatever it is: a job neither held nor given up comes again at once, for ever
            logger.error("a job cannot be read", extra={"job": lease.job_id, **describe(error)})
            self._give_up(lease, _UNREADABLE, request_of(message))
            return None
        with self._changed:
            self._held[lease.job_id] = replace(lease, deadline=job.deadline)
        if lease.tries > 1:
            logger.warning("a job is tried again", extra={"requests": [job.request_id], "tries": lease.tries})
            self._on_redelivery()
        return job

    def _images(self, lease: Lease) -> bytes:
        found: Any = self._redis.client.get(keys.images(lease.job_id))
        return found or b""

    def _give_up(self, lease: Lease, failure: Failed, requests: list[str]) -> None:
        fields = {"job": lease.job_id, "requests": requests, "tries": lease.tries, "reason": failure.message}
        logger.error("a job is given up", extra=fields)
        try:
            settled = self._settle(lease, failure, failure.message)
        except AWAY:
            with self._changed:
                self._unsent[lease.job_id] = lease, failure, failure.message
            raise
        if settled:
            self._on_dead_letter()

    def _settle(self, lease: Lease, outcome: Outcome, dead_because: str = "") -> int:
        """What the script `settle` says."""
        job_id = lease.job_id
        names = [lease.stream, keys.load(lease.model), keys.record(job_id), keys.result(job_id), keys.DEAD]
        over: Arguments = [job_id, lease.entry, state_after(outcome), pack_outcome(outcome), milliseconds(RESULT_TTL_S)]
        dead: Arguments = [dead_because, milliseconds(_DEAD_LETTER_TTL_S)]
        kept: Arguments = [self._bounds.outcomes, self._bounds.bytes]
        worked: Arguments = [milliseconds(worked_s(outcome) or 0.0), milliseconds(finishing_s(outcome))]
        told = [*over, *dead, *kept, *_THROUGHPUT, *worked, pack_outcome(EXPIRED), self._consumer]
        answer: int = self._redis.run("settle", names, told)
        self._let_go(job_id)
        return answer

    def _let_go(self, job_id: str) -> None:
        with self._changed:
            self._held.pop(job_id, None)
            self._unsent.pop(job_id, None)
            self._changed.notify_all()

    def _wait(self, seen: dict[str, bytes], left_s: float) -> None:
        """Wait until a job may be there: for a new entry, or where it may not have one, until something is settled."""
        if seen:
            streams: Any = seen
            block = max(1, milliseconds(min(left_s, LONGEST_BLOCK_S)))
            self._reach(lambda: self._redis.client.xread(streams, count=1, block=block), None, writes=False)
        else:
            with self._changed:
                self._changed.wait(left_s)

    def _beat(self) -> None:
        beat_s = min(self._reclaim_after_s / _BEATS_PER_SILENCE, _LONGEST_BEAT_S)
        for beat in itertools.count():
            duties = [self._renew, self._send] if beat > 0 else [self._sweep]
            if beat % _BEATS_PER_REMINDER == 0:
                duties.append(self._remind)
            for duty in duties:
                try:
                    duty()
                except Exception as error:  # whatever it is: without beats others take what this process works on
                    logger.error("a beat failed", extra=describe(error))
            if self._closing.wait(beat_s):
                return

    def _send(self) -> None:
        """Hand over what could not be, up to the first that cannot again: that is tried last the next time.

        One that Redis never takes, as it is too large for it or for the link, has expired with its job.
        """
        with self._changed:
            unsent = list(self._unsent.items())
        for job_id, (lease, made, dead_because) in unsent:
            outcome = EXPIRED if time.monotonic() > lease.deadline + LATE_S else made
            answer = self._reach(partial(self._settle, lease, outcome, dead_because), None)
            if answer is None:
                with self._changed:
                    self._unsent[job_id] = self._unsent.pop(job_id)
                return
            if (became := _what_became(answer, outcome, made)) is None:
                continue
            if dead_because:
                self._on_dead_letter()
            else:
                self._on_late_outcome(became)

    def _renew(self) -> None:
        with self._changed:
            held = list(self._held.values())
        for stream in {lease.stream for lease in held}:
            entries = [lease.entry for lease in held if lease.stream == stream]
            self._command("renew", [stream], [self._consumer, *entries])

    def _remind(self) -> None:
        """Say what is expected of every model: a Redis that lost its data knows nothing of it."""
        with self._changed:
            expected = list(self._expected.items())
        for model, per_second in expected:
            cost, seconds = expectation(per_second)
            self._command("expect", [keys.speed(model)], [str(cost), str(seconds), milliseconds(SPEED_TTL_S)])

    def _sweep(self) -> None:
        with self._changed:
            models = list(self._models)
        for model, priority in product(models, Priority):
            self._command("sweep", [keys.jobs(model, priority)], [self._consumer, milliseconds(_FORGOTTEN_AFTER_S)])

    def _command(self, name: str, names: Sequence[str], arguments: Arguments) -> None:
        """Run a script of which no answer is needed, where Redis can be reached."""
        self._reach(partial(self._redis.run, name, names, arguments), None)

    def _reach(self, call: Callable[[], Result], otherwise: Result, *, writes: bool = True) -> Result:
        """What the call gives; ``otherwise`` where Redis is away, which is then left alone for a moment.

        The call must ask Redis something: where it succeeds and ``writes``, Redis is back.
        """
        away_until = self._away_until  # Once, as several threads come here.
        if away_until is not None and time.monotonic() < away_until:
            return otherwise
        failures = self._failures
        try:
            result = call()
        except AWAY as error:
            self._note_away(error)
            return otherwise
        if writes:
            self._note_back(failures)
        return result

    def _note_away(self, error: Exception) -> None:
        with self._noting:
            if self._away_until is None:
                logger.warning("the queue is away", extra={"error": type(error).__name__, "detail": str(error)})
            self._failures += 1
            self._away_until = time.monotonic() + _AFTER_ERROR_S

    def _note_back(self, failures: int) -> None:
        """Note an answer to what was asked after so many failures: one that another thread saw since is newer."""
        if self._away_until is None:
            return  # Nearly always: without the lock.
        with self._noting:
            if self._away_until is not None and failures == self._failures:
                logger.info("the queue is back")
                self._reclaims_from = time.monotonic() + self._reclaim_after_s  # First: no moment without patience.
                self._away_until = None


def _what_became(answer: int, outcome: Outcome, made: Outcome) -> Outcome | None:
    """What became of a job for which the script `settle` gave this answer to ``outcome``, in place of ``made``.

    Where an answer got lost, one of both was there before.
    """
    before = outcome if isinstance(made, Finished) else made
    return {1: outcome, 2: EXPIRED, 11: made, 12: EXPIRED, 21: before, 22: EXPIRED}.get(answer)
