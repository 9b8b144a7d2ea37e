"""A bundle that is replaced while it is served: the new revision takes over, and nobody loses an image."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engines.pipeline import Pipeline
from service.jobs import Finished
from service.models.catalogue import Catalogue, ModelError
from service.models.opening import open_pipeline
from service.models.registry import Models
from service.queue.memory import MemoryQueue
from service.roles import open_front
from service.settings import Settings
from tests.service.helpers import Running, error, pipeline_of, running, wait_until
from tests.service.several import SeveralBench, damage, generate, replace, room_for

pytestmark = pytest.mark.anyio

LONG_S = 60.0


class Replaced:
    """A worker on a queue, whose models' clock the test sets."""

    def __init__(self, settings: Settings, max_bytes: int, opener: Callable[[Path], Pipeline] | None = None) -> None:
        self.now = 0.0
        self.queue = MemoryQueue(1000)
        self.models = Models(
            Catalogue.of(settings),
            opener or (lambda path: open_pipeline(settings, path)),
            max_bytes,
            clock=lambda: self.now,
            owes=self.queue.owes,
            drain_s=LONG_S,
        )
        self.bench = SeveralBench(self.models, self.queue)

    def states(self) -> dict[str, bool]:
        """Whether they retire, of the bundles that are loaded, by name@revision."""
        return {f"{state.name}@{state.revision}": state.retiring for state in self.models.states() if state.loaded}

    async def until(self, condition: Callable[[], bool]) -> None:
        """Step, while the models' clock goes on, until the condition holds."""
        async with asyncio.timeout(60):
            while not condition():
                self.now += 1
                await asyncio.to_thread(self.bench.worker.step, 0.01)

    def close(self) -> None:
        self.bench.worker.stop()
        self.models.close()


@pytest.fixture
def roomy(several: Settings) -> Iterator[Replaced]:
    replaced = Replaced(several, 2**30)
    yield replaced
    replaced.close()


@pytest.fixture
def tight(several: Settings) -> Iterator[Replaced]:
    """Room for one bundle, so not for two revisions of it."""
    replaced = Replaced(several, room_for(several, 1).max_model_bytes)
    yield replaced
    replaced.close()


@pytest.mark.parametrize("room", ["roomy", "tight"])
async def test_what_waits_for_the_old_revision_is_made(room: str, folder: Path, request: pytest.FixtureRequest) -> None:
    this: Replaced = request.getfixturevalue(room)
    old = this.models.catalogue.find("amber").manifest.model
    this.models.load("amber").result(60)
    lease = this.models.lease("amber")
    assert lease is not None
    lease.release()
    names = [f"old-{k}" for k in range(12)]
    for name in names:
        await this.bench.submit(name, old, seconds=600)
    new = replace(folder, "amber")
    await this.bench.submit("new", new, seconds=600)
    await this.until(lambda: not this.queue.owes(old) and not this.queue.owes(new))
    for name in (*names, "new"):
        await this.bench.finished(name)
    await this.until(lambda: this.states() == {new: False})


async def test_the_old_revision_stays_while_another_process_has_its_job(roomy: Replaced, folder: Path) -> None:
    old = roomy.models.catalogue.find("amber").manifest.model
    roomy.models.load("amber").result(60)
    new = replace(folder, "amber")
    await roomy.bench.submit("elsewhere", old, seconds=3600)
    assert [job.id for job in roomy.queue.take({old: 1}, 0)] == ["elsewhere"]
    await roomy.until(lambda: roomy.states() == {old: True, new: False})
    began = roomy.now
    await roomy.until(lambda: roomy.now > began + 20)
    assert roomy.states() == {old: True, new: False}
    await roomy.until(lambda: old not in roomy.states())
    assert roomy.now >= began + LONG_S  # No job that was accepted can have waited for longer.


async def test_what_comes_late_for_the_old_revision_is_made(roomy: Replaced, folder: Path) -> None:
    old = roomy.models.catalogue.find("amber").manifest.model
    roomy.models.load("amber").result(60)
    new = replace(folder, "amber")
    roomy.now += 1
    roomy.models.takeable()
    roomy.models.load("amber").result(60)
    assert roomy.states() == {old: True, new: False}
    await roomy.bench.submit("late", old)
    await roomy.bench.finished("late")


async def test_a_new_revision_that_does_not_load_leaves_the_old_one_where_it_is(tight: Replaced, folder: Path) -> None:
    old = tight.models.catalogue.find("amber").manifest.model
    tight.models.load("amber").result(60)
    new = replace(folder, "amber", steps=(1, 4))
    damage(folder / "amber")
    await tight.bench.submit("new", new, seconds=600)
    await tight.until(lambda: not tight.queue.owes(new))
    assert tight.states() == {old: False}
    await tight.bench.submit("old", old, seconds=600)
    await tight.bench.finished("old")


async def taken_over(app: Running, name: str, old: str) -> str:
    """Ask until another revision answers; every answer has its image."""
    async with asyncio.timeout(60):
        while True:
            answer = await app.post("/generate", prompt="a cat", model=name)
            assert answer.status_code == 200, answer.text
            if (revision := answer.json()["revision"]) != old:
                return f"{name}@{revision}"


async def test_a_new_revision_takes_over_by_itself(anyio_backend: str, several: Settings, folder: Path) -> None:
    async with running(several) as app:
        await generate(app, "blue")
        old = pipeline_of(app.service, "blue").manifest.revision
        new = replace(folder, "blue")
        assert await taken_over(app, "blue", old) == new
        assert (await app.post("/generate", prompt="a cat", model="blue", steps=8)).status_code == 200
        error(await app.post("/generate", prompt="a cat", model=f"blue@{old}"), 404, "model_not_found", "model")


async def test_a_new_revision_takes_over_on_load(anyio_backend: str, several: Settings, folder: Path) -> None:
    async with running(several) as app:
        await generate(app, "blue")
        new = replace(folder, "blue")
        answer = await app.client.post("/models/blue/load")
        assert f"blue@{answer.json()['revision']}" == new
        answer = await app.post("/generate", prompt="a cat", model="blue", steps=8)
        assert f"blue@{answer.json()['revision']}" == new


async def test_a_new_revision_takes_over_in_every_process(anyio_backend: str, several: Settings, folder: Path) -> None:
    queue = MemoryQueue(1000)
    front = several.model_copy(update={"role": "api"})
    async with (
        running(several.model_copy(update={"role": "worker"}), queue=queue),
        running(front, queue=queue, opener=open_front) as one,
        running(front, queue=queue, opener=open_front) as two,
    ):
        for app in (one, two):
            await generate(app, "amber")
        old = pipeline_of(one.service, "amber").manifest.revision
        new = replace(folder, "amber")
        assert (await one.client.post("/models/amber/load")).status_code == 200
        assert await taken_over(one, "amber", old) == new
        assert await taken_over(two, "amber", old) == new


async def test_a_front_serves_the_old_revision_where_the_new_one_is_damaged(
    anyio_backend: str, several: Settings, folder: Path
) -> None:
    now = [0.0]
    models = Models(
        Catalogue.of(several), lambda path: open_front(several, path), 2**30, clock=lambda: now[0], fronts=True
    )
    try:
        models.load("amber").result(60)
        old = models.catalogue.find("amber").manifest.model
        replace(folder, "amber", steps=(1, 4))
        damage(folder / "amber")
        now[0] += 1
        while models.lease("amber") is None:
            with pytest.raises(Exception, match=r"step-4\.onnx"):
                models.load("amber").result(60)
        lease = models.lease("amber")
        assert lease is not None
        assert lease.pipeline.manifest.model == old
        lease.release()
    finally:
        models.close()


async def test_a_worker_that_drains_makes_what_waits_for_the_room_of_the_old_revision(
    tight: Replaced, folder: Path
) -> None:
    tight.models.load("amber").result(60)
    key = replace(folder, "amber")
    await tight.bench.submit("a", key)
    await tight.until(lambda: bool(tight.bench.worker._parked))
    tight.bench.worker.drain()
    outcome = asyncio.ensure_future(tight.queue.outcome("a"))
    await tight.until(outcome.done)
    assert isinstance(await outcome, Finished)


async def test_an_unload_is_over_once_every_revision_is_closed(roomy: Replaced, folder: Path) -> None:
    roomy.models.load("amber").result(60)
    held = roomy.models.lease("amber")
    assert held is not None
    key = replace(folder, "amber")
    roomy.models.load("amber").result(60)
    gone = roomy.models.unload("amber")
    await roomy.until(lambda: key not in roomy.states())
    assert not gone.done()
    held.release()
    await roomy.until(gone.done)
    assert roomy.states() == {}


async def test_an_unload_does_not_load_the_revision_that_came_meanwhile(several: Settings, folder: Path) -> None:
    opened: list[Path] = []
    replaced = Replaced(several, 2**30, lambda path: opened.append(path) or open_pipeline(several, path))  # type: ignore[func-returns-value]
    replaced.models.load("amber").result(60)
    replace(folder, "amber")
    await replaced.until(replaced.models.unload("amber").done)
    assert len(opened) == 1
    replaced.close()


async def test_what_is_replaced_while_it_waits_for_room_is_not_opened_in_the_room_of_what_it_was(
    tight: Replaced, folder: Path
) -> None:
    tight.models.load("amber").result(60)
    held = tight.models.lease("amber")
    assert held is not None
    waiting = tight.models.load("blue")
    wait_until(lambda: any(tight.states().values()))
    replace(folder, "blue", steps=(1, 2, 4, 8))
    held.release()
    with pytest.raises(ModelError, match="was replaced while it was opened"):
        waiting.result(60)
    tight.models.load("blue").result(60)
