"""The API's side of the Redis queue: what this process submitted and waits for."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Iterable, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any

from service.jobs import CANCELLED, LOST, Failed, Job, Outcome
from service.queue import admission, keys
from service.queue.addresses import LONGEST_BLOCK_S
from service.queue.base import (
    FARTHEST_POSITION,
    HEAD_START_S,
    WATCHED_S,
    Bounds,
    Keep,
    KeyConflict,
    QueueFull,
    QueueUnavailable,
    Stage,
    Status,
)
from service.queue.clients import AWAY, Arguments, CoroutinesRedis
from service.queue.keys import GRACE_S, RESULT_TTL_S, milliseconds
from service.queue.wire import Packed, WireError, pack_job, pack_outcome, unpack_outcome

logger = logging.getLogger(__name__)

# How often results are looked for without a reply: it may be lost where a Redis fails over to another.
_POLL_S = LONGEST_BLOCK_S
_AFTER_ERROR_S = 0.5
_CANCELLED_WITHIN_S = 0.05

# What the script needs of the policy in service/queue/admission.py.
_DOOR: Arguments = [
    str(admission.MARGIN),
    str(admission.NEWCOMERS),
    str(admission.BESIDE),
    str(admission.PACE),
    milliseconds(admission.SHORTEST_S),
    milliseconds(admission.FARTHEST_S),
    milliseconds(admission.KEPT_S),
    admission.MOST_PROMISES,
]

# How Redis refuses to write; as a script's error it has no class of its own in Redis 6.
_OUT_OF_MEMORY = "OOM command not allowed"
_UNREADABLE = Failed("engine", "the answer of the worker cannot be read")


@dataclass(eq=False, slots=True)
class _Wait:
    """One who waits for an outcome; the job is ``accepted`` once the queue said so."""

    outcome: asyncio.Future[Outcome] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    accepted: bool = False


class Submissions:
    """Submits jobs, and learns of their outcomes from one stream of replies that all workers write to.

    Its methods belong to one event loop.
    """

    def __init__(self, redis: CoroutinesRedis, max_cost: int, bounds: Bounds) -> None:
        self._redis = redis
        self._door: Arguments = [max_cost, *_DOOR]
        self._bounds = bounds
        self._replies = keys.replies(uuid.uuid4().hex)
        self._waiting: dict[str, _Wait] = {}
        self._listening: asyncio.Task[None] | None = None
        self._away = self._full = False

    async def submit(self, job: Job, keep: Keep | None = None) -> str:
        """See JobQueue.submit."""
        if keep is None:
            await self._submit_and_wait(job)
            return job.id
        return await self._at_the_door(job, keep, pack_job(job))

    async def ask(self, job: Job, keep: Keep | None) -> None:
        """See JobQueue.ask."""
        await self._at_the_door(job, keep, Packed(b"", b""), asks=True)

    async def holder(self, keep: Keep) -> str | None:
        """See JobQueue.holder."""
        if keep.key is None:
            return None
        found = await self._run("holder", [keys.claim(keep.key)], [keep.digest])
        return None if found is None else _named(found)

    async def _submit_and_wait(self, job: Job) -> None:
        """Have the job accepted, and its outcome from then on waited for."""
        if job.id in self._waiting:
            raise ValueError(f"job {job.id} was submitted before")
        # Before the queue has it, because the reply may come faster than the queue's answer.
        wait = self._waiting[job.id] = _Wait()
        try:
            await self._at_the_door(job, None, pack_job(job))
            wait.accepted = True
        finally:
            if not wait.accepted:
                del self._waiting[job.id]
        if self._listening is None:
            # In a context of its own: its log lines are not those of the request that happened to be the first.
            self._listening = asyncio.get_running_loop().create_task(self._listen(), context=Context())

    async def outcome(self, job_id: str) -> Outcome:
        """See JobQueue.outcome."""
        outcome = await asyncio.shield(self._waiting[job_id].outcome)
        self._waiting.pop(job_id, None)
        return outcome

    async def status(self, job_id: str, preview: bool) -> Status:
        """See JobQueue.status."""
        names = [keys.record(job_id), keys.result(job_id)] + ([keys.preview(job_id)] if preview else [])
        found = await self._run("status", names, [FARTHEST_POSITION, *map(milliseconds, (WATCHED_S, HEAD_START_S))])
        if found is None:
            raise KeyError(job_id)
        return _status(job_id, found)

    async def cancel(self, job_id: str) -> Stage | None:
        """See JobQueue.cancel. Any process may cancel: who waits elsewhere learns of it by a reply."""
        wait = self._waiting.pop(job_id, None)
        if wait is not None and not wait.outcome.done():
            wait.outcome.set_result(CANCELLED)
        names = [keys.record(job_id), keys.result(job_id)]
        told = pack_outcome(CANCELLED) if wait is None else b""
        kept = [milliseconds(RESULT_TTL_S), self._bounds.outcomes, self._bounds.bytes]
        stage = await self._run("cancel", names, [job_id, told, *kept])
        return _STAGES.get(stage)

    async def close(self) -> None:
        """Stop listening."""
        # More than once: a cancellation that meets an answer of Redis is lost in Python 3.11's `asyncio.wait_for`.
        while self._listening is not None and not self._listening.done():
            self._listening.cancel()
            await asyncio.wait({self._listening}, timeout=_CANCELLED_WITHIN_S)

    async def _run(self, name: str, names: Sequence[str], arguments: Arguments) -> Any:
        """The answer of a script. Raises QueueUnavailable while Redis is away."""
        try:
            return await self._redis.run(name, names, arguments)
        except AWAY as error:
            note = self._note_full if _OUT_OF_MEMORY in str(error) else self._note_away
            note(error)
            raise QueueUnavailable from error

    async def _at_the_door(self, job: Job, keep: Keep | None, packed: Packed, *, asks: bool = False) -> str:
        """Have the job accepted; who ``asks`` is not let in. Returns its id, or that of the job which has its key."""
        # Clocks of hosts differ, and a monotonic one means nothing elsewhere: only durations leave this process.
        now = time.monotonic()
        left = milliseconds(job.deadline - now)
        ttl = max(0, left) + milliseconds(GRACE_S)
        model = job.model
        names = [keys.load(model), keys.promises(model), keys.record(job.id), keys.MODELS]
        costs = [job.cost, len(job.tasks)]
        times = [milliseconds(now - job.submitted), left, ttl]
        kept: list[str | int] = []
        if keep is not None:
            kept = [milliseconds(keep.seconds), keep.note, keep.digest]
            names += [keys.claim(keep.key)] if keep.key is not None else []
        arguments: Arguments = [
            job.id,
            model,
            packed.message,
            packed.images,
            *costs,
            *times,
            self._replies,
            job.identity,
            int(job.priority),
            int(asks),
            *self._door,
            *kept,
        ]
        answer = await self._run("submit", names, arguments)
        if answer[0] == _ACCEPTED:
            if not asks:  # Who asks writes nothing, and so has an answer from a Redis that takes no writes too.
                self._note_back()
                self._note_room()
            return job.id
        if answer[0] == _REFUSED:
            raise QueueFull(float(answer[1]))
        return _named(answer)

    async def _listen(self) -> None:
        """Hand outcomes to those who wait, as replies tell of them, and now and then without a reply."""
        polled = time.monotonic()
        while True:
            try:
                replies = await self._read()
                if self._away:
                    await self._unlink(keys.NOTHING)  # A Redis that is read may still take no writes.
                    self._note_back()
                if replies:
                    await self._collect(reply[b"id"].decode() for _, reply in replies)
                    async with self._redis.turn() as client:
                        await client.xdel(self._replies, *(entry for entry, _ in replies))
                if time.monotonic() - polled >= _POLL_S:
                    polled = time.monotonic()
                    await self._collect(job_id for job_id, wait in self._waiting.items() if wait.accepted)
            except Exception as error:  # whatever it is: without this task nobody would have an answer
                self._note_away(error)
                await asyncio.sleep(_AFTER_ERROR_S)

    def _note_away(self, error: Exception) -> None:
        if not self._away:
            logger.warning("the queue is away", extra={"error": type(error).__name__, "detail": str(error)})
        self._away = True

    def _note_full(self, error: Exception) -> None:
        if not self._full:
            logger.warning("the queue is full", extra={"detail": str(error)})
        self._full = True

    def _note_room(self) -> None:
        if self._full:
            logger.info("the queue has room again")
        self._full = False

    def _note_back(self) -> None:
        if self._away:
            logger.info("the queue is back")
        self._away = False

    async def _read(self) -> list[tuple[bytes, dict[bytes, bytes]]]:
        """From the beginning: what was heard of is deleted, and ids start anew with a Redis that lost the stream."""
        client = await self._redis.client()
        found: Any = await client.xread({self._replies: "0-0"}, block=milliseconds(_POLL_S))
        return found[0][1] if found else []

    async def _collect(self, job_ids: Iterable[str]) -> None:
        waiting = {job_id: self._waiting[job_id] for job_id in job_ids if job_id in self._waiting}
        waiting = {job_id: wait for job_id, wait in waiting.items() if not wait.outcome.done()}
        if not waiting:
            return
        names = [name for job_id in waiting for name in (keys.record(job_id), keys.result(job_id))]
        found = await self._redis.run("collect", names)
        over: list[str] = []
        for (job_id, wait), state in zip(waiting.items(), found, strict=True):
            # Meanwhile the job may have been cancelled.
            if not wait.outcome.done() and (outcome := _outcome(job_id, state)) is not None:
                wait.outcome.set_result(outcome)
                over.append(keys.result(job_id))
        if over:
            await self._unlink(*over)

    async def _unlink(self, *names: str) -> None:
        async with self._redis.turn() as client:
            await client.unlink(*names)


_REFUSED, _ACCEPTED, _CONFLICT = 0, 1, 3
_STAGES: dict[bytes | None, Stage] = {b"queued": "queued", b"running": "running"}
_GOES_ON = 1


def _named(answer: Sequence[Any]) -> str:
    """The job that a key names, as the scripts `submit` and `holder` say. Raises KeyConflict."""
    if answer[0] == _CONFLICT:
        raise KeyConflict
    job_id: bytes = answer[1]
    return job_id.decode()


def _outcome(job_id: str, state: bytes | int) -> Outcome | None:
    """What a line of the script `collect` says; None where the job goes on."""
    if isinstance(state, int):
        return None if state == _GOES_ON else LOST
    try:
        return unpack_outcome(state)
    except WireError as error:
        logger.error("an outcome cannot be read", extra={"job": job_id, "detail": str(error)})
        return _UNREADABLE


def _status(job_id: str, found: Sequence[Any]) -> Status:
    """What the script `status` says."""
    state, done, total, left_ms, note, position, outcome, preview = found
    return Status(
        state=state.decode(),
        done=int(done),
        total=int(total),
        left_s=int(left_ms) / 1000,
        note=note.decode(),
        position=position if position >= 0 else None,
        outcome=None if outcome is None else _outcome(job_id, outcome),
        preview=preview,
    )
