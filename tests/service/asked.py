"""Jobs asked for, asked about and followed, as a client does it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from service.schemas import JobResponse
from tests.service.helpers import (
    Running,
)

ASYNC = {"Prefer": "respond-async"}


async def ask(app: Running, path: str = "/generate", **fields: Any) -> str:
    """Have a job accepted; its id."""
    answer = await app.client.post(path, json={"prompt": "a cat", **fields}, headers=ASYNC)
    assert answer.status_code == 202, answer.text
    job_id: str = answer.json()["id"]
    return job_id


async def look(app: Running, job_id: str) -> dict[str, Any]:
    answer = await app.client.get(f"/jobs/{job_id}")
    assert answer.status_code == 200, answer.text
    return JobResponse.model_validate_json(answer.text).model_dump()


async def over(app: Running, job_id: str) -> dict[str, Any]:
    """The job once it is over."""
    async with asyncio.timeout(60):
        while (found := await look(app, job_id))["status"] in ("queued", "running"):
            await asyncio.sleep(0.01)
    return found


async def state(app: Running, job_id: str, wanted: str) -> None:
    async with asyncio.timeout(60):
        while (await look(app, job_id))["status"] != wanted:
            await asyncio.sleep(0.01)


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Names and data of server-sent events; comments are left out."""
    found = []
    for block in text.strip().split("\n\n"):
        if not block.startswith(":"):
            name, data = block.split("\n")
            assert name.startswith("event: ")
            assert data.startswith("data: ")
            found.append((name[7:], json.loads(data[6:])))
    return found
