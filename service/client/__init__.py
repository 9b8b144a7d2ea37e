"""A typed client of the service, in two forms: `Client` blocks, `AsyncClient` is awaited.

    with Client("http://127.0.0.1:8000") as client:
        made = client.generate("a red apple", steps=4, seed=7)
        made.images[0].picture.show()

It needs httpx: ``pip install 'fewstep[client]'``.
"""

from service.client.answers import Images, Job, MadeImage
from service.client.asynchronous import AsyncClient
from service.client.blocking import Client
from service.client.calls import EditOptions, GenerateOptions, InpaintOptions
from service.client.errors import (
    AnswerUnreadable,
    ClientError,
    JobFailed,
    ServiceError,
    TimeLimitPassed,
    Unreachable,
)
from service.client.pictures import Picture
from service.client.tries import Retries

__all__ = [
    "AnswerUnreadable",
    "AsyncClient",
    "Client",
    "ClientError",
    "EditOptions",
    "GenerateOptions",
    "Images",
    "InpaintOptions",
    "Job",
    "JobFailed",
    "MadeImage",
    "Picture",
    "Retries",
    "ServiceError",
    "TimeLimitPassed",
    "Unreachable",
]
