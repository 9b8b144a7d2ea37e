"""The client that is awaited."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self, Unpack

import anyio
import httpx

from service.client import calls
from service.client.answers import Answer, Images, Job, Result
from service.client.calls import Call, EditOptions, GenerateOptions, InpaintOptions
from service.client.connection import DEFAULT_POLL_S, DEFAULT_TIMEOUT_S, DEFAULT_URL, Connection
from service.client.errors import ClientError, TimeLimitPassed, as_client_errors
from service.client.pictures import Picture
from service.client.tries import Retries, Tries
from service.schemas import Capabilities, Model, ModelList


class AsyncClient:
    """`Client`, awaited. It belongs to the event loop of its first call.

    A call that is cancelled closes its connection. The service then drops its work where ``retries`` allows one try
    only; else its images are made for who comes back.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        retries: Retries | None = None,
        http: httpx.AsyncClient | None = None,
    ) -> None:
        self._connection = Connection(url, api_key, timeout_s, retries or Retries())
        self._own = http is None
        self._http = http or httpx.AsyncClient()

    async def __aenter__(self) -> Self:
        """The client itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        if self._own:
            await self._http.aclose()

    async def generate(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Images:
        """Make images from a prompt, or from the class that ``class_name`` names."""
        return await self._send(calls.generate(prompt, options))

    async def edit(self, image: Picture, prompt: str | None = None, **options: Unpack[EditOptions]) -> Images:
        """Make images that start from an image."""
        return await self._send(await anyio.to_thread.run_sync(calls.edit, image, prompt, options))

    async def inpaint(
        self, image: Picture, mask: Picture, prompt: str | None = None, **options: Unpack[InpaintOptions]
    ) -> Images:
        """Make anew what the mask marks; ``mask_mode`` says how, white pixels by default."""
        return await self._send(await anyio.to_thread.run_sync(calls.inpaint, image, mask, prompt, options))

    async def submit_generate(self, prompt: str | None = None, **options: Unpack[GenerateOptions]) -> Job:
        """`generate` as a job, which goes on by itself: see `wait`, `job` and `cancel`."""
        return await self._send(calls.submitted(calls.generate(prompt, options)))

    async def submit_edit(self, image: Picture, prompt: str | None = None, **options: Unpack[EditOptions]) -> Job:
        """`edit` as a job."""
        return await self._send(calls.submitted(await anyio.to_thread.run_sync(calls.edit, image, prompt, options)))

    async def submit_inpaint(
        self, image: Picture, mask: Picture, prompt: str | None = None, **options: Unpack[InpaintOptions]
    ) -> Job:
        """`inpaint` as a job."""
        return await self._send(
            calls.submitted(await anyio.to_thread.run_sync(calls.inpaint, image, mask, prompt, options))
        )

    async def job(self, job_id: str) -> Job:
        """How far a job is."""
        return await self._send(calls.job(job_id))

    async def wait(
        self, job_id: str, *, every_s: float = DEFAULT_POLL_S, progress: Callable[[Job], object] | None = None
    ) -> Images:
        """The images of a job, which is asked after until it is over; ``progress`` is told of every answer before.

        It takes as long as the job, which ends at its own time limit. Raises JobFailed for a job without images.
        """
        while not (job := await self.job(job_id)).over:
            if progress is not None:
                progress(job)
            await anyio.sleep(every_s)
        return job.result

    async def cancel(self, job_id: str) -> Job:
        """Give a job up; answers with what became of it."""
        return await self._send(calls.cancel(job_id))

    async def models(self) -> ModelList:
        """The bundles there are."""
        return await self._send(calls.models())

    async def load(self, name: str) -> Model:
        """Load a bundle; returns when it is warm."""
        return await self._send(calls.load(name))

    async def unload(self, name: str) -> Model:
        """Give a bundle's memory back; returns when all that use it are done."""
        return await self._send(calls.unload(name))

    async def capabilities(self, model: str | None = None) -> Capabilities:
        """What a bundle can do, the default one for None, and the bounds of the service."""
        return await self._send(calls.capabilities(model))

    async def _send(self, call: Call[Result]) -> Result:
        tries = self._connection.tries()
        while True:
            try:
                return call.read(await self._once(call, tries))
            except ClientError as error:
                await anyio.sleep(tries.wait_after(error))

    async def _once(self, call: Call[Result], tries: Tries) -> Answer:
        left_s = tries.left_s()
        request = self._connection.request(self._http, call, left_s)
        try:
            with as_client_errors(), anyio.fail_after(left_s):
                response = await self._http.send(request)
        except TimeoutError as error:
            raise TimeLimitPassed from error
        return Answer(response.status_code, response.headers, response.content)
