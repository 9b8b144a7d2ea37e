"""The client that blocks until the answer is there."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from types import TracebackType
from typing import Self, Unpack

import httpx

from service.client import calls
from service.client.answers import Answer, Images, Job, Result
from service.client.bounded import within
from service.client.calls import Call, EditOptions, GenerateOptions, InpaintOptions
from service.client.connection import DEFAULT_POLL_S, DEFAULT_TIMEOUT_S, DEFAULT_URL, Connection
from service.client.errors import ClientError, as_client_errors
from service.client.pictures import Picture
from service.client.tries import Retries, Tries
from service.schemas import Capabilities, Model, ModelList


class Client:
    """Calls of a service at ``url``. Safe to share between threads; close it, or use it in a ``with``.

    ``timeout_s`` bounds a call with all its tries and waits. ``http`` is a client of your own to send with, for
    certificates or proxies; it stays open. ``api_key`` is sent as a Bearer token, or in X-Api-Key where ``url`` or
    ``http`` has credentials of its own. The tries of a call share an Idempotency-Key, so that no image is made twice.

    What is sent and gives no result raises ClientError: a ServiceError for what the service refused, else Unreachable,
    TimeLimitPassed or AnswerUnreadable. What cannot be sent raises ValueError, or OSError for a file that cannot be
    read; settings that make no sense raise ValueError at once.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retries: Retries | None = None,
        http: httpx.Client | None = None,
    ) -> None:
        self._connection = Connection(url, api_key, timeout_s, retries or Retries())
        self._own = http is None
        self._http = http or httpx.Client()

    def __enter__(self) -> Self:
        """The client itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Close the connections."""
        if self._own:
            self._http.close()

    def generate(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Images:
        """Make images from a prompt, or from the class that ``class_name`` names."""
        return self._send(calls.generate(prompt, options))

    def edit(self, image: Picture, prompt: str | None = None, **options: Unpack[EditOptions]) -> Images:
        """Make images that start from an image."""
        return self._send(calls.edit(image, prompt, options))

    def inpaint(
        self, image: Picture, mask: Picture, prompt: str | None = None, **options: Unpack[InpaintOptions]
    ) -> Images:
        """Make anew what the mask marks; ``mask_mode`` says how, white pixels by default."""
        return self._send(calls.inpaint(image, mask, prompt, options))

    def submit_generate(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Job:
        """`generate` as a job, which goes on by itself: see `wait`, `job` and `cancel`."""
        return self._send(calls.submitted(calls.generate(prompt, options)))

    def submit_edit(self, image: Picture, prompt: str | None = None, **options: Unpack[EditOptions]) -> Job:
        """`edit` as a job."""
        return self._send(calls.submitted(calls.edit(image, prompt, options)))

    def submit_inpaint(
        self, image: Picture, mask: Picture, prompt: str | None = None, **options: Unpack[InpaintOptions]
    ) -> Job:
        """`inpaint` as a job."""
        return self._send(calls.submitted(calls.inpaint(image, mask, prompt, options)))

    def job(self, job_id: str) -> Job:
        """How far a job is."""
        return self._send(calls.job(job_id))

    def wait(
        self, job_id: str, *, every_s: float = DEFAULT_POLL_S, progress: Callable[[Job], object] | None = None
    ) -> Images:
        """The images of a job, which is asked after until it is over; ``progress`` is told of every answer before.

        It takes as long as the job, which ends at its own time limit. Raises JobFailed for a job without images.
        """
        while not (job := self.job(job_id)).over:
            if progress is not None:
                progress(job)
            time.sleep(every_s)
        return job.result

    def cancel(self, job_id: str) -> Job:
        """Give a job up; answers with what became of it."""
        return self._send(calls.cancel(job_id))

    def models(self) -> ModelList:
        """The bundles there are."""
        return self._send(calls.models())

    def load(self, name: str) -> Model:
        """Load a bundle; returns when it is warm."""
        return self._send(calls.load(name))

    def unload(self, name: str) -> Model:
        """Give a bundle's memory back; returns when all that use it are done."""
        return self._send(calls.unload(name))

    def capabilities(self, model: str | None = None) -> Capabilities:
        """What a bundle can do, the default one for None, and the bounds of the service."""
        return self._send(calls.capabilities(model))

    def _send(self, call: Call[Result]) -> Result:
        tries = self._connection.tries()
        while True:
            try:
                return call.read(self._once(call, tries))
            except ClientError as error:
                time.sleep(tries.wait_after(error))

    def _once(self, call: Call[Result], tries: Tries) -> Answer:
        left_s = tries.left_s()
        request = self._connection.request(self._http, call, left_s)
        return within(left_s, partial(self._exchange, request, tries))

    def _exchange(self, request: httpx.Request, tries: Tries) -> Answer:
        with as_client_errors(), closing(self._http.send(request, stream=True)) as response:
            body = bytearray()
            for chunk in response.iter_bytes():
                # Nobody waits any more for what comes later.
                tries.left_s()
                body += chunk
        return Answer(response.status_code, response.headers, bytes(body))
