"""Clients that send requests to several API processes as careful clients do, and note what became of each."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

import httpx

from benchmarks.requests import Pixels, endpoint, fields_of, first_image
from engines.pipeline import Task

TIME_LIMIT_S = 30.0
"""The time limit of each request, and the time in which its client begins to send it again."""

GRACE_S = 10.0
"""How long after its time limit a request is waited for. What has no answer by then is lost."""

Post = Callable[[str, Mapping[str, Any], Mapping[str, str]], Awaitable[httpx.Response]]

_AGAIN_S = 0.25
_POLL_S = 0.2
_NEVER_ACCEPTED = {
    *("queue_full", "too_many_requests", "too_many_bytes", "queue_unavailable"),
    *("draining", "not_ready", "failed"),
}
_ERROR_FIELDS = {"type", "code", "message", "param", "request_id", "retryable"}


class Kind(StrEnum):
    """How a client asks. Only those that give an Idempotency-Key may send again what may have been accepted."""

    PLAIN = "plain"
    KEYED = "keyed"
    JOB = "job"


class Fate(StrEnum):
    """What became of a request. FORGOTTEN: the service said that it was accepted, and is known no longer."""

    REFUSED = "refused"
    ANSWERED = "answered"
    FAILED = "failed"
    FORGOTTEN = "forgotten"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Tried:
    """What one try gave: an answer, or an error and when to come back where that makes sense."""

    fate: Fate
    code: str = ""
    again_after_s: float | None = None
    document: dict[str, Any] | None = None


@dataclass(slots=True)
class Record:
    """One request, and how it ended after ``seconds``, ``away_s`` of which it stayed away as it was told to."""

    task: Task
    kind: Kind
    key: str
    post: Post
    last: Tried | None = None
    forgotten: bool = False
    seconds: float = 0.0
    away_s: float = 0.0
    given_again: bool = True

    @property
    def fate(self) -> Fate:
        assert self.last is not None
        return self.last.fate

    @property
    def image(self) -> Pixels:
        """The image that it was answered with."""
        assert self.last is not None
        assert self.last.document is not None
        return first_image(self.last.document)

    @property
    def headers(self) -> dict[str, str]:
        keyed = {} if self.kind is Kind.PLAIN else {"Idempotency-Key": self.key}
        return keyed | ({"Prefer": "respond-async"} if self.kind is Kind.JOB else {})


class Crowd:
    """All clients together. ``urls`` gives the API processes that there are; each try goes to the next of them."""

    def __init__(self, urls: Callable[[], Sequence[str]]) -> None:
        self.records: list[Record] = []
        self._urls = urls
        self._turns = itertools.count()
        self._numbers = itertools.count()
        self._sending: set[asyncio.Task[None]] = set()
        # A connection a request: one that is kept open would break between two requests.
        limits = httpx.Limits(max_keepalive_connections=0, max_connections=None)
        self.http = httpx.AsyncClient(limits=limits, timeout=TIME_LIMIT_S + GRACE_S)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for sending in self._sending:
            sending.cancel()
        await asyncio.gather(*self._sending, return_exceptions=True)
        await self.http.aclose()

    def send(self, task: Task, kind: Kind, post: Post | None = None) -> Record:
        """Have a client ask for it, in a way of its own where it has one, and return at once."""
        record = Record(task, kind, f"key-{next(self._numbers)}", post or self._post)
        self.records.append(record)
        sending = asyncio.create_task(self._send(record))
        self._sending.add(sending)
        return record

    async def finish(self) -> None:
        """Wait until every client has an answer or has given up."""
        await asyncio.gather(*self._sending)

    async def ask_again(self, record: Record, forgetful: bool) -> None:
        """Note whether an answered request, sent again under its key, gets the same answer, that of the same job.

        From a queue that is ``forgetful`` no more can be asked for than the same image.
        """
        if record.fate is not Fate.ANSWERED or record.kind is Kind.PLAIN:
            return
        assert record.last is not None
        before, again = record.last.document, (await self._try(record)).document
        if before is None or again is None:
            record.given_again = False
        else:
            same_job = forgetful or before["id"] == again["id"]
            record.given_again = same_job and bool((first_image(before) == first_image(again)).all())

    def url(self) -> str:
        """Whose turn it is, dead or alive: clients do not know."""
        urls = self._urls()
        return urls[next(self._turns) % len(urls)]

    async def _send(self, record: Record) -> None:
        began = time.monotonic()
        while True:
            record.last = tried = await self._try(record)
            record.seconds = time.monotonic() - began
            record.forgotten = record.forgotten or tried.fate is Fate.FORGOTTEN
            may_repeat = tried.fate is Fate.REFUSED or record.kind is not Kind.PLAIN
            wait_s = tried.again_after_s
            if wait_s is None or not may_repeat or record.seconds + wait_s > TIME_LIMIT_S:
                return
            if tried.fate is Fate.REFUSED:
                record.away_s += wait_s
            await asyncio.sleep(wait_s)

    async def _try(self, record: Record) -> Tried:
        fields = fields_of(record.task) | {"timeout_ms": int(1000 * TIME_LIMIT_S)}
        url = f"{self.url()}{endpoint(record.task)}"
        try:
            answer = await record.post(url, fields, record.headers)
        except httpx.TransportError as error:
            return _without_answer(error)
        if answer.status_code == 202:
            return await self._follow(answer.json()["id"])
        return _understood(answer)

    async def _post(self, url: str, fields: Mapping[str, Any], headers: Mapping[str, str]) -> httpx.Response:
        return await self.http.post(url, json=fields, headers=headers)

    async def _follow(self, job_id: str) -> Tried:
        """Ask any process for the job until it is over."""
        end = time.monotonic() + TIME_LIMIT_S + GRACE_S
        while time.monotonic() < end:
            await asyncio.sleep(_POLL_S)
            try:
                answer = await self.http.get(f"{self.url()}/jobs/{job_id}")
            except httpx.TransportError:
                continue
            if answer.status_code == 404:
                return Tried(Fate.FORGOTTEN, "job_not_found", _AGAIN_S)
            if answer.status_code != 200:
                continue
            document = answer.json()
            if document["status"] == "done":
                return Tried(Fate.ANSWERED, document=document["result"])
            if document["error"] is not None:
                return _failed(document["error"], _AGAIN_S)
        return Tried(Fate.LOST, "job without an end")


def _without_answer(error: httpx.TransportError) -> Tried:
    """What it means that there is no answer."""
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return Tried(Fate.REFUSED, "connection refused", _AGAIN_S)
    if isinstance(error, httpx.TimeoutException):
        return Tried(Fate.LOST, "no answer")
    return Tried(Fate.FAILED, "connection broken", _AGAIN_S)


def _understood(answer: httpx.Response) -> Tried:
    """What an answer says. One that is neither an image nor an error of the one shape is as good as none."""
    try:
        document = answer.json()
        if answer.status_code == 200:
            return Tried(Fate.ANSWERED, document=document)
        error = document["error"]
    except (ValueError, LookupError, TypeError):
        return Tried(Fate.LOST, f"unclear answer {answer.status_code}")
    return _failed(error, float(answer.headers.get("retry-after", _AGAIN_S)))


def _failed(error: dict[str, Any], again_after_s: float) -> Tried:
    if error.keys() != _ERROR_FIELDS or not error["message"]:
        return Tried(Fate.LOST, "unclear error")
    code = error["code"]
    after_s = again_after_s if error["retryable"] else None
    if code in _NEVER_ACCEPTED:
        return Tried(Fate.REFUSED, code, after_s)
    if "lost the job" in error["message"]:
        return Tried(Fate.FORGOTTEN, "the queue lost the job", after_s)
    return Tried(Fate.FAILED, code, after_s)
