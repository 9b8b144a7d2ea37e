"""Every metric says what happened."""

from __future__ import annotations

import sys
import threading
import time
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engines.backends.base import EngineError
from engines.provenance import package_version
from service.queue.base import QueueStats, QueueUnavailable
from service.settings import Settings
from service.telemetry.gpus import GpuMemory, open_gpus
from service.telemetry.metrics import Metrics
from tests.service.helpers import Running, b64, png, random_image, running

pytestmark = pytest.mark.anyio


async def test_a_request_leaves_its_marks(app: Running) -> None:
    await app.post("/generate", prompt="a cat", n=3)
    await app.post("/edit", prompt="a cat", image=b64(png(random_image())), strength=0.5)
    await app.post("/generate", prompt="")
    await app.client.get("/nowhere")
    assert app.metric("fewstep_requests_total", endpoint="generate", outcome="ok") == 1
    assert app.metric("fewstep_requests_total", endpoint="generate", outcome="invalid") == 1
    assert app.metric("fewstep_requests_total", endpoint="edit", outcome="ok") == 1
    assert app.metric("fewstep_requests_total", endpoint="unmatched", outcome="invalid") == 1
    assert app.metric("fewstep_images_total") == 4
    assert app.metric("fewstep_tick_rows_sum") == 3 * 4 + 2
    ticks = app.metric("fewstep_tick_rows_count")
    assert ticks == app.metric("fewstep_tick_duration_seconds_count")
    assert 6 <= ticks <= 14  # images of one request need not share every tick
    assert app.metric("fewstep_queue_wait_seconds_count") == 2
    for stage in ("encode", "denoise", "decode"):
        assert app.metric("fewstep_stage_duration_seconds_count", stage=stage) == 2
    # A refusal takes no time, and says nothing of how long images take.
    assert app.metric("fewstep_request_duration_seconds_count", endpoint="generate") == 1
    assert app.metric("fewstep_inflight_requests") == 0
    assert app.metric("fewstep_worker_up") == 1
    manifest = app.pipeline.manifest
    labels = {"model": manifest.name, "revision": manifest.revision}
    [build] = [
        sample
        for family in app.service.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "fewstep_build_info"
    ]
    assert build.value == 1
    assert labels.items() <= build.labels.items()


async def test_a_model_is_told_of_until_the_last_that_is_loaded_of_it_closes(app: Running) -> None:
    models, manifest = app.service.models, app.pipeline.manifest
    labels = {"version": package_version(), "model": manifest.name, "revision": manifest.revision}
    held = models.lease(None)
    assert held is not None
    first = models.unload(manifest.name)
    models.load(None).result(60)
    held.release()
    first.result(60)
    assert app.metric("fewstep_build_info", **labels) == 1
    models.unload(manifest.name).result(60)
    assert app.metric("fewstep_build_info", **labels) == 0


async def test_what_another_engine_runs_is_told(app: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    name = app.pipeline.manifest.name
    assert app.metric("fewstep_stand_ins", model=name, state="failed") == 0
    states = {"step-4.onnx": "failed", "step-2.onnx": "building", "step-1.onnx": "building"}
    monkeypatch.setattr(type(app.pipeline), "stand_ins", states)
    assert app.metric("fewstep_stand_ins", model=name, state="failed") == 1
    assert app.metric("fewstep_stand_ins", model=name, state="building") == 2
    [model] = (await app.client.get("/models")).json()["models"]
    assert model["stand_ins"] == states


async def test_failures_are_counted_by_cause(app: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise EngineError("broken")

    monkeypatch.setattr(app.pipeline, "tick", broken)
    answer = await app.post("/generate", prompt="a cat")
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "generation_failed"
    assert app.metric("fewstep_batch_failures_total", cause="EngineError") == 1
    assert app.metric("fewstep_requests_total", endpoint="generate", outcome="error") == 1


async def test_the_exposition_parses_and_has_every_metric(app: Running) -> None:
    answer = await app.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    names = {family.name for family in text_string_to_metric_families(answer.text)}
    counters = ["requests", "jobs", "images", "rejected", "cancelled", "batch_failures", "redeliveries", "dead_letter"]
    seconds = ["request_duration", "queue_wait", "stage_duration", "tick_duration", "oldest_queued"]
    gauges = [
        "tick_rows",
        "queue_wait_ratio",
        "queue_depth",
        "queue_cost",
        "inflight_requests",
        "worker_up",
        "build_info",
        "stand_ins",
    ]
    expected = [*counters, *gauges, *(f"{name}_seconds" for name in seconds)]
    assert {f"fewstep_{name}" for name in expected} <= names
    assert "process_resident_memory_bytes" in names
    other = await app.client.get("/metrics", headers={"Accept": "application/openmetrics-text"})
    assert other.headers["content-type"].startswith("application/openmetrics-text")


def test_the_queue_is_read_at_every_scrape() -> None:
    metrics = Metrics()
    stats = iter([QueueStats(1, 4, 0.5), QueueStats(2, 8, 1.5)])
    metrics.watch_queue(lambda: next(stats, QueueStats(3, 12, 2.5)))
    found = [metrics.registry.get_sample_value("fewstep_queue_cost") for _ in range(3)]
    assert found[-1] == 12.0


def test_a_queue_that_is_away_leaves_its_gauges_out_and_no_scrape_fails() -> None:
    def away() -> QueueStats:
        raise QueueUnavailable

    metrics = Metrics()
    metrics.watch_queue(away)
    assert metrics.registry.get_sample_value("fewstep_queue_depth") is None
    assert metrics.registry.get_sample_value("fewstep_images_total") == 0


def test_a_queue_that_gives_no_answer_holds_up_no_scrape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.telemetry.metrics._LOOK_S", 0.1)
    go, metrics = threading.Event(), Metrics()

    def hang() -> QueueStats:
        assert go.wait(60)
        return QueueStats(1, 4, 0.5)

    metrics.watch_queue(hang)  # As clients of a cluster do for ten seconds.
    for _ in range(3):
        assert metrics.registry.get_sample_value("fewstep_queue_depth") is None
    go.set()
    while metrics.registry.get_sample_value("fewstep_queue_depth") != 1:
        time.sleep(0.01)


def test_apps_do_not_share_counts() -> None:
    first, second = Metrics(), Metrics()
    first.images.inc()
    assert second.registry.get_sample_value("fewstep_images_total") == 0


async def test_buckets_resolve_a_millisecond_to_half_a_minute(app: Running) -> None:
    text = (await app.client.get("/metrics")).text
    assert 'fewstep_tick_duration_seconds_bucket{le="0.001"}' in text
    assert 'fewstep_tick_duration_seconds_bucket{le="30.0"}' in text


class NvmlError(Exception):
    """What the library raises."""


class FakeNvml(SimpleNamespace):
    """The part of NVIDIA's management library that is used, on GPUs of which each has 80 bytes."""

    NVMLError = NvmlError

    def __init__(self, used: list[int], driver: bool = True) -> None:
        super().__init__(used=used, driver=driver)

    def nvmlInit(self) -> None:  # noqa: N802
        self._ask()

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.used)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:  # noqa: N802
        self._ask()
        return SimpleNamespace(used=self.used[handle], total=80)

    def _ask(self) -> None:
        if not self.driver:
            raise NvmlError


def test_the_memory_of_gpus_is_read_at_every_scrape(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = FakeNvml([10, 20])
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    metrics = Metrics()
    read = open_gpus()
    assert read is not None
    metrics.watch_gpus(read)
    assert read() == (GpuMemory(10, 80), GpuMemory(20, 80))

    def value(name: str, gpu: str) -> float | None:
        return metrics.registry.get_sample_value(f"fewstep_gpu_memory_{name}_bytes", {"gpu": gpu})

    nvml.used[1] = 30
    assert [value("used", gpu) for gpu in "01"] == [10, 30]
    assert [value("total", gpu) for gpu in "01"] == [80, 80]
    nvml.driver = False
    assert value("used", "0") is None
    assert metrics.registry.get_sample_value("fewstep_images_total") == 0


@pytest.mark.parametrize("nvml", [None, FakeNvml([10], driver=False), FakeNvml([])], ids=["library", "driver", "gpu"])
async def test_what_has_no_gpu_has_no_such_metric(
    settings: Settings, nvml: FakeNvml | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # None: it cannot be imported
    async with running(settings) as app:
        assert "gpu_memory" not in (await app.client.get("/metrics")).text


async def test_the_service_reports_its_gpus(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml([10]))
    async with running(settings) as app:
        assert 'fewstep_gpu_memory_used_bytes{gpu="0"} 10.0' in (await app.client.get("/metrics")).text
