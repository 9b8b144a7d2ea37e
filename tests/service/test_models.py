"""Several bundles in one service: loaded when asked for, the least recently used out first, nothing in flight lost."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.backends.base import EngineError
from engines.bundle import MANIFEST_NAME
from engines.pipeline import Generate, Pipeline
from service.errors import ApiError, model_refusals
from service.models import opening
from service.models.catalogue import Catalogue, Entry, LoadsEnded, ModelError, UnknownModel
from service.models.opening import open_pipeline
from service.models.refused import Refused
from service.models.registry import Models
from service.settings import Settings
from tests.bundles import make_tiny_bundle
from tests.service.helpers import SIZE, Gate, Running, error, pipeline_of, running, until
from tests.service.several import NAMES, damage, generate, loaded, room_for

pytestmark = pytest.mark.anyio


async def test_a_model_is_loaded_when_it_is_first_named(anyio_backend: str, several: Settings, folder: Path) -> None:
    async with running(several) as app:
        assert await loaded(app) == {"tiny"}
        image = await generate(app, "blue", steps=2)
        assert await loaded(app) == {"tiny", "blue"}
        with Pipeline.open(folder / "blue", "fake", 1) as pipeline:
            assert np.array_equal(image, pipeline.run([Generate("a red heart", 2, 2.0, 3)])[0])
        revision = pipeline_of(app.service, "blue").manifest.revision
        assert (await app.post("/generate", prompt="a cat", model=f"blue@{revision}")).json()["revision"] == revision
        labels = {"version": "0.1.0", "model": "blue", "revision": revision}
        assert app.metric("fewstep_build_info", **labels) == 1


async def test_the_least_recently_used_goes_first(anyio_backend: str, several: Settings) -> None:
    async with running(room_for(several, 2)) as app:
        await generate(app, "amber")
        assert await loaded(app) == {"tiny", "amber"}
        await generate(app, "tiny")
        await generate(app, "blue")
        assert await loaded(app) == {"tiny", "blue"}
        await generate(app, "coral")
        assert await loaded(app) == {"blue", "coral"}
        await generate(app, None)
        assert await loaded(app) == {"coral", "tiny"}
        listed = (await app.client.get("/models")).json()
        assert listed["memory_bytes"] <= listed["max_memory_bytes"]


async def test_what_is_in_use_is_closed_only_when_its_last_image_is_made(
    anyio_backend: str, several: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(room_for(several, 1)) as app:
        gate = Gate(app.pipeline, monkeypatch)
        first = asyncio.create_task(generate(app, "tiny"))
        await asyncio.to_thread(gate.reached.wait, 20)
        second = asyncio.create_task(generate(app, "amber"))
        await until(lambda: any(state.retiring for state in app.service.models.states()))
        again = asyncio.create_task(generate(app, "tiny"))
        await asyncio.sleep(0.2)
        assert not any(task.done() for task in (first, second, again))
        gate.opened.set()
        images = await asyncio.gather(first, second, again)
        assert np.array_equal(images[0], images[2])
        assert len(await loaded(app)) == 1


async def test_unloading_waits_for_those_who_use_it_and_a_request_brings_it_back(
    anyio_backend: str, several: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(several) as app:
        gate = Gate(app.pipeline, monkeypatch)
        image = asyncio.create_task(generate(app, None))
        await asyncio.to_thread(gate.reached.wait, 20)
        unloading = asyncio.create_task(app.client.post("/models/tiny/unload"))
        await asyncio.sleep(0.2)
        assert not unloading.done()
        gate.opened.set()
        answer = await unloading
        assert (answer.status_code, answer.json()["loaded"], answer.json()["in_use"]) == (200, False, 0)
        assert await loaded(app) == set()
        assert (await app.client.get("/readyz")).status_code == 200
        assert np.array_equal(await generate(app, None), await image)
        assert (await app.client.post("/models/coral/unload")).json()["loaded"] is False


async def test_what_is_being_loaded_is_unloaded_once_it_is_there(anyio_backend: str, several: Settings) -> None:
    go = threading.Event()

    def slow(settings: Settings, path: Path) -> Pipeline:
        assert path.name == "tiny" or go.wait(60)
        return open_pipeline(settings, path)

    async with running(several, opener=slow) as app:
        loading = asyncio.create_task(app.client.post("/models/coral/load"))
        await until(lambda: bool(app.service.models._loading))
        unloading = asyncio.create_task(app.client.post("/models/coral/unload"))
        await asyncio.sleep(0.2)
        assert not unloading.done()
        go.set()
        assert (await unloading).json()["loaded"] is False
        assert (await loading).status_code == 200
        assert await loaded(app) == {"tiny"}


async def test_load_by_name(anyio_backend: str, several: Settings) -> None:
    async with running(several) as app:
        answer = await app.client.post("/models/coral/load")
        assert answer.status_code == 200
        assert answer.json() | {"revision": "", "memory_bytes": 0} == {
            "name": "coral", "revision": "", "default": False, "loaded": True, "in_use": 0, "memory_bytes": 0,
            "stand_ins": {},
        }  # fmt: skip
        assert await loaded(app) == {"tiny", "coral"}
        for verb in ("load", "unload"):
            error(await app.client.post(f"/models/azure/{verb}"), 404, "model_not_found", "model")
        assert (
            "coral"
            in error(await app.post("/generate", prompt="a cat", model="azure"), 404, "model_not_found", "model")[
                "message"
            ]
        )


async def test_a_bundle_that_appears_is_found(
    anyio_backend: str, several: Settings, folder: Path, tmp_path: Path
) -> None:
    async with running(several) as app:
        make_tiny_bundle(tmp_path / "newer", size=SIZE, name="dusk").path.rename(folder / "dusk")
        await generate(app, "dusk")


async def test_bundles_are_listed_while_the_default_is_away(
    anyio_backend: str, several: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(several.bundle, tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    async with running(several.model_copy(update={"bundle": "mine"})) as app:
        await app.client.post("/models/tiny/unload")
        (tmp_path / "mine").rename(tmp_path / "away")
        listed = await app.client.get("/models")
        assert listed.status_code == 200
        assert {model["name"] for model in listed.json()["models"]} == {"amber", "blue", "coral"}
        await generate(app, "amber")
        for name in (None, "tiny"):
            away = await app.post("/generate", prompt="a cat", model=name)
            assert error(away, 503, "model_unavailable", "model")["retryable"]
            assert away.headers["retry-after"] == "60"
            assert str(tmp_path) not in away.text
        (tmp_path / "away").rename(tmp_path / "mine")
        await generate(app, None)


async def test_a_default_bundle_of_another_name_takes_over(
    anyio_backend: str, several: Settings, tmp_path: Path
) -> None:
    current = tmp_path / "current"
    current.symlink_to(several.bundle)
    newer = make_tiny_bundle(tmp_path / "newer", size=SIZE, name="dusk")
    async with running(several.model_copy(update={"bundle": str(current)})) as app:
        assert (await app.post("/generate", prompt="a cat")).json()["model"] == "tiny"
        current.unlink()
        current.symlink_to(newer.path)
        answer = await app.client.post("/models/tiny/unload")
        assert (answer.status_code, answer.json()["name"], answer.json()["loaded"]) == (200, "tiny", False)
        assert (await app.post("/generate", prompt="a cat")).json()["model"] == "dusk"
        listed = (await app.client.get("/models")).json()["models"]
        assert [model["name"] for model in listed if model["default"]] == ["dusk"]
        error(await app.post("/generate", prompt="a cat", model="tiny"), 404, "model_not_found", "model")


async def test_what_is_always_taken_away_again_is_waited_for_no_longer_than_was_asked(
    anyio_backend: str, several: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(several) as app:
        monkeypatch.setattr(app.service.models, "lease", lambda name: None)
        error(await app.post("/generate", prompt="a cat", timeout_ms=200), 504, "deadline_exceeded")


async def test_a_model_that_does_not_load_is_said_and_harms_no_other(
    anyio_backend: str, several: Settings, folder: Path
) -> None:
    with (folder / "amber" / "step-4.onnx").open("r+b") as graph:
        graph.seek(40)
        graph.write(b"\x00\x01")
    async with running(several) as app:
        for _ in range(2):
            damaged = await app.post("/generate", prompt="a cat", model="amber")
            found = error(damaged, 503, "model_unavailable", "model")
            assert app.metric("fewstep_rejected_total", reason="model_unavailable") >= 1
            assert "step-4.onnx" in found["message"]
            assert "retry-after" not in damaged.headers
            assert (found["retryable"], str(folder) in found["message"]) == (False, False)
        await generate(app, None)
        small = several.model_copy(update={"max_model_bytes": 10})
    async with running(small, wait=False) as app:
        await until(lambda: app.service.failure is not None)
        assert "the bound is 10" in str(app.service.failure)


async def test_capabilities_of_each(anyio_backend: str, several: Settings) -> None:
    async with running(several) as app:
        assert (await app.client.get("/capabilities")).json()["model"] == "tiny"
        assert (await app.client.get("/capabilities?model=coral")).json()["model"] == "coral"
        error(await app.client.get("/capabilities?model=x"), 404, "model_not_found", "model")
        assert await loaded(app) == {"tiny"}


async def test_all_models_under_load_with_room_for_one(anyio_backend: str, several: Settings) -> None:
    async with running(room_for(several, 1)) as app:
        wanted = [*NAMES, "tiny"] * 6
        images = await asyncio.gather(*(generate(app, name) for name in wanted))
        alike = {name: images[index] for index, name in enumerate(wanted)}
        assert all(np.array_equal(image, alike[name]) for name, image in zip(wanted, images, strict=True))
        assert len(await loaded(app)) == 1


async def test_a_wait_for_a_load_ends_with_the_deadline_and_the_load_goes_on(
    anyio_backend: str, several: Settings
) -> None:
    go = threading.Event()

    def slow(settings: Settings, path: Path) -> Pipeline:
        assert path.name == "tiny" or go.wait(60)
        return open_pipeline(settings, path)

    async with running(several, opener=slow) as app:
        error(await app.post("/generate", prompt="a cat", model="blue", timeout_ms=50), 504, "deadline_exceeded")
        await generate(app, None)
        go.set()
        await until(lambda: app.service.models.lease("blue") is not None)


def test_one_load_for_all_who_wait(models: Models) -> None:
    futures = [models.load("amber") for _ in range(5)]
    assert not futures[0].cancel()
    assert [future.result(60) for future in futures] == [None] * 5
    assert len([state for state in models.states() if state.loaded]) == 1


def test_a_lease_keeps_it_open_and_is_given_back_once(models: Models) -> None:
    models.load(None).result(60)
    lease = models.lease(None)
    assert lease is not None
    other = lease.again()
    gone = models.unload("tiny")
    lease.release()
    lease.release()
    assert models.lease(None) is None
    assert not gone.done()
    assert other.again().release() is None
    other.release()
    assert gone.result(60) is None
    assert models.memory_bytes == 0


def test_two_bundles_of_one_name_are_refused(models: Models, folder: Path, tmp_path: Path) -> None:
    make_tiny_bundle(tmp_path / "again", size=SIZE, name="amber", steps=(2,)).path.rename(folder / "other")
    with pytest.raises(ModelError, match="both called amber"):
        models.load("amber")
    with pytest.raises(UnknownModel, match="azure"):
        models.load("azure")


def test_a_copy_of_a_bundle_is_no_other_bundle(models: Models, folder: Path) -> None:
    shutil.copytree(folder / "amber", folder / "copy")
    models.load("amber").result(60)
    assert [state.name for state in models.states()].count("amber") == 1
    models.unload("amber").result(60)
    models.load("amber").result(60)


def test_what_is_wrong_with_a_bundle_is_logged_once(
    models: Models, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "amber" / MANIFEST_NAME).write_text("{")
    for _ in range(3):
        models._look(now=True)
    [record] = [record for record in caplog.records if record.message == "a bundle cannot be read"]
    assert record.__dict__["folder"] == str(folder / "amber")
    assert MANIFEST_NAME in record.__dict__["detail"]


async def test_an_unload_that_is_given_up_goes_on(anyio_backend: str, several: Settings) -> None:
    async with running(several.model_copy(update={"max_timeout_ms": 50, "timeout_ms": 50})) as app:
        app.service.models.load("amber").result(60)
        lease = app.service.models.lease("amber")
        assert lease is not None
        for _ in range(2):
            error(await app.client.post("/models/amber/unload"), 504, "deadline_exceeded")
        lease.release()
        app.service.models.unload("amber").result(60)
        assert await loaded(app) == {"tiny"}


def test_what_cannot_be_loaded_costs_no_other_its_place(several: Settings, folder: Path) -> None:
    opened: list[str] = []

    def opener(path: Path) -> Pipeline:
        opened.append(path.name)
        return open_pipeline(several, path)

    models = Models(Catalogue.of(several), opener, room_for(several, 1).max_model_bytes)
    good = (folder / "blue" / "step-4.onnx").read_bytes()
    damage(folder / "blue")
    try:
        models.load("amber").result(60)
        with pytest.raises(ModelError, match=r"step-4\.onnx"):
            models.load("blue").result(60)
        with pytest.raises(ModelError, match=r"step-4\.onnx"):
            models.load("blue")
        assert [state.name for state in models.states() if state.loaded and not state.retiring] == ["amber"]
        (folder / "blue" / "step-4.onnx").write_bytes(good)
        models.load("blue").result(60)
        assert opened == ["amber", "blue"]
    finally:
        models.close()


def test_what_did_not_open_is_tried_again_after_a_minute(several: Settings) -> None:
    seconds = [0.0]
    tries: list[Path] = []

    def opener(path: Path) -> Pipeline:
        tries.append(path)
        if len(tries) == 1:
            raise MemoryError("the device is full")
        return open_pipeline(several, path)

    models = Models(Catalogue.of(several), opener, 2**30, clock=lambda: seconds[0])
    try:
        with pytest.raises(ModelError, match="the device is full"):
            models.load("amber").result(60)
        seconds[0] = 59
        with pytest.raises(ModelError, match="the device is full"):
            models.load("amber")
        seconds[0] = 61
        models.load("amber").result(60)
        assert len(tries) == 2
    finally:
        models.close()


@pytest.mark.parametrize(
    ("dtype", "factor"),
    [("float32", 1), ("fp32", 1), ("fp16+fp32", 2), ("bfloat16", 2), ("bf16", 2), ("fp32+int8", 4),
     ("float8_e4m3fn", 4), ("int4", 8)],
)  # fmt: skip
def test_memory_is_reckoned_in_fp32_whatever_is_stored(several: Settings, dtype: str, factor: int) -> None:
    entry = Catalogue.of(several).find("amber")
    stored = sum(record.size_bytes for record in entry.manifest.files.values())
    manifest = entry.manifest.model_copy(update={"weights_dtype": dtype})
    assert dataclasses.replace(entry, manifest=manifest).memory_bytes == factor * stored


@pytest.mark.parametrize(
    ("cores", "changes", "lone"),
    [
        (2, {}, 2),
        (2, {"backend": "auto"}, 2),
        (1, {}, 0),
        (3, {}, 0),
        (2, {"threads": 1}, 0),
        (2, {"backend": "fake"}, 0),
    ],
)
def test_a_lone_row_has_both_cores_of_two_and_the_weights_are_held_twice_for_it(
    several: Settings, monkeypatch: pytest.MonkeyPatch, cores: int, changes: dict[str, Any], lone: int
) -> None:
    monkeypatch.setattr(opening, "usable_cores", lambda: cores)
    settings = several.model_copy(update={"backend": "ort", "threads": 0, **changes})
    opened: list[tuple[int, int]] = []

    def opens(path: Path, backend: str, threads: int, *others: Any) -> Any:
        opened.append((threads, others[-1]))
        raise EngineError("enough")

    monkeypatch.setattr(opening.Pipeline, "open", opens)
    with pytest.raises(EngineError, match="enough"):
        opening.open_pipeline(settings, several.models or Path())
    assert opened == [(max(1, cores - 1), lone)]
    once, held = (Catalogue.of(each).find("amber").memory_bytes for each in (several, settings))
    assert held == (2 if lone else 1) * once


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux's /proc")
def test_what_is_unloaded_gives_its_memory_back() -> None:
    code = """
from pathlib import Path
from service.models.catalogue import Catalogue
from service.models.registry import Models
from service.models.opening import open_pipeline
from service.models.refused import Refused
from service.settings import Settings

def megabytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6

settings = Settings(threads=1, max_batch=1)
models = Models(Catalogue.of(settings), lambda path: open_pipeline(settings, path), 2**40)
before = megabytes()
models.load(None).result(60)
loaded = megabytes()
models.unload("emoji").result(60)
print(before, loaded, megabytes())
models.close()
"""
    printed = subprocess.check_output([sys.executable, "-c", code], text=True)
    before, loaded, after = map(float, printed.split())
    assert loaded > before + 150
    assert after < before + 0.4 * (loaded - before)


def test_nothing_is_loaded_once_it_is_closed(models: Models) -> None:
    models.close()
    with pytest.raises(LoadsEnded, match="shutting down"):
        models.load("amber")


def test_a_load_that_did_not_begin_ends_without_an_error_in_the_log(
    several: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    begun, go = threading.Event(), threading.Event()

    def slow(path: Path) -> Pipeline:
        begun.set()
        assert go.wait(60)
        return open_pipeline(several, path)

    models = Models(Catalogue.of(several), slow, 2**30)
    models.load("blue")
    assert begun.wait(60)
    waits = models.load("amber")
    models.cancel_loads()
    go.set()
    with pytest.raises(LoadsEnded):
        waits.result(60)
    models.close()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_log_says_which_backend_auto_took_and_why_not_the_others(
    several: Settings, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.backends.BEST_FIRST", ("pytorch-cuda", "fake", "ort"))
    automatic = several.model_copy(update={"backend": "auto"})
    models = Models(Catalogue.of(automatic), lambda path: open_pipeline(automatic, path), 2**30)
    with caplog.at_level(logging.INFO):
        models.load("blue").result(60)
    models.close()
    (record,) = [record for record in caplog.records if record.getMessage() == "loaded"]
    assert vars(record)["backend"] == "fake"
    assert vars(record)["passed_over"].keys() == {"pytorch-cuda"}
    assert "the bundle has no program of" in vars(record)["passed_over"]["pytorch-cuda"]


async def test_what_needs_a_load_while_the_service_ends_may_be_tried_again(app: Running) -> None:
    app.service.models.unload("tiny").result(60)
    app.service.models.cancel_loads()
    error(await app.post("/generate", prompt="a cat"), 503, "shutting_down")


async def test_a_bundle_that_does_not_close_is_told_and_its_room_is_free(
    app: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> None:
        raise EngineError("the device is gone")

    pipeline = pipeline_of(app.service)
    monkeypatch.setattr(pipeline, "close", fails)
    app.service.models.unload("tiny").result(60)
    [told] = [record for record in caplog.records if record.message == "a bundle does not close"]
    assert "the device is gone" in str(vars(told))
    assert app.service.models.memory_bytes == 0
    monkeypatch.undo()
    pipeline.close()


def test_what_may_pass_may_be_asked_for_again_and_no_folder_is_told(several: Settings) -> None:
    entry = Catalogue.of(several).find("amber")
    for cause in (MemoryError(f"{entry.path}"), EngineError(f"{entry.path}: no memory")):
        refused = Refused()
        for failed in (refused.note(entry, entry.fingerprint(), cause), _refusal(refused, entry)):
            with pytest.raises(ApiError) as caught, model_refusals():
                raise failed
            answer = caught.value
            assert (answer.retryable, answer.headers) == (True, {"Retry-After": "60"})
            assert str(entry.path) not in answer.message
            assert str(entry.path) in str(failed)


def _refusal(refused: Refused, entry: Entry) -> ModelError:
    with pytest.raises(ModelError) as caught:
        refused.check(entry)
    return caught.value
