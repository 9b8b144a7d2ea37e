"""Every metric of the service, once. Each app has a registry of its own, so tests do not share counts."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from service.models.loaded import ModelState
from service.queue.base import QueueStats, QueueUnavailable
from service.telemetry.gpus import ReadGpus
from service.threads import Helper

PREFIX = "fewstep"

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_PARTS = tuple(tenths / 10 for tenths in range(1, 11))
_LOOK_S = 4.0
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The counters, histograms and gauges, in base units and with few labels."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = self._counter("requests", "Requests answered", "endpoint", "outcome")
        self.jobs = self._counter("jobs", "Jobs that are over", "outcome")
        self.images = self._counter("images", "Images made")
        self.rejected = self._counter("rejected", "Requests turned away unserved", "reason")
        self.rejected.labels("too_many_connections")  # An alert looks for its first increase.
        self.refused = self._counter("content_refused", "Prompts and images refused by the safety check", "stage")
        self.cancelled = self._counter("cancelled", "Jobs given up by their client", "stage")
        self.batch_failures = self._counter("batch_failures", "Batches that failed", "cause")
        self.redeliveries = self._counter("redeliveries", "Jobs taken again after their worker died")
        self.dead_letters = self._counter("dead_letter", "Jobs given up after too many tries, or unreadable")
        self.request_seconds = self._histogram(
            "request_duration_seconds", "From a request's first byte to what it asked for, a fault or a 504", "endpoint"
        )
        self.queue_seconds = self._histogram("queue_wait_seconds", "From acceptance of a job to its start")
        self.queue_ratio = Histogram(
            f"{PREFIX}_queue_wait_ratio",
            "Part of its time limit that a job had waited when it started",
            buckets=_PARTS,
            registry=self.registry,
        )
        self.stage_seconds = self._histogram("stage_duration_seconds", "Time of a job in a stage", "stage")
        self.tick_seconds = self._histogram("tick_duration_seconds", "One call of the step engine")
        self.tick_rows = Histogram(f"{PREFIX}_tick_rows", "Rows in a tick", buckets=_ROWS, registry=self.registry)
        self.inflight = self._gauge("inflight_requests", "Image requests being served")
        self.worker_up = self._gauge("worker_up", "1 while the worker runs")
        self._build = self._gauge(
            "build_info", "1 for each model that is loaded, with what runs it", "version", "model", "revision"
        )

    def watch_queue(self, stats: Callable[[], QueueStats]) -> None:
        """Report ``stats`` at every scrape."""
        self.registry.register(_QueueCollector(stats))

    def watch_gpus(self, read: ReadGpus) -> None:
        """Report the memory of the GPUs at every scrape."""
        self.registry.register(_GpuCollector(read))

    def watch_models(self, loaded: Callable[[], Iterable[ModelState]]) -> None:
        """Report at every scrape which engines the models that are loaded wait for."""
        self.registry.register(_ModelCollector(loaded))

    def set_model(self, version: str, model: str, revision: str, loaded: bool) -> None:
        """Say that a model runs here, or no longer does."""
        if loaded:
            self._build.labels(version, model, revision).set(1)
        else:
            self._build.remove(version, model, revision)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"{PREFIX}_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"{PREFIX}_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", text, labels, buckets=_SECONDS, registry=self.registry)


class _QueueCollector(Collector):
    """What waits, where the queue says so in time: a cluster that hangs would take longer than a scrape may."""

    def __init__(self, stats: Callable[[], QueueStats]) -> None:
        self._stats = stats
        self._helper = Helper("scraper")

    def collect(self) -> Iterable[Metric]:
        asked = self._helper.submit(self._stats)
        try:
            stats = asked.result(_LOOK_S)
        except (QueueUnavailable, TimeoutError):
            asked.cancel()
            return  # What waits is not known: no sample is better than a wrong one.
        yield GaugeMetricFamily(f"{PREFIX}_queue_depth", "Jobs that wait", value=stats.depth)
        yield GaugeMetricFamily(f"{PREFIX}_queue_cost", "Row-ticks that wait", value=stats.cost)
        yield GaugeMetricFamily(
            f"{PREFIX}_oldest_queued_seconds", "Age of the oldest waiting job", value=stats.oldest_s
        )


class _ModelCollector(Collector):
    def __init__(self, loaded: Callable[[], Iterable[ModelState]]) -> None:
        self._loaded = loaded

    def collect(self) -> Iterable[Metric]:
        text = "Graphs that another engine runs than was asked for"
        gauge = GaugeMetricFamily(f"{PREFIX}_stand_ins", text, labels=["model", "state"])
        models = list(self._loaded())
        counts = Counts({(model.name, state): 0 for model in models for state in ("building", "failed")})
        for model in models:
            counts.update((model.name, state) for state in model.stand_ins.values())
        for labels, count in counts.items():
            gauge.add_metric(labels, count)
        yield gauge


class _GpuCollector(Collector):
    def __init__(self, read: ReadGpus) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        used = GaugeMetricFamily(f"{PREFIX}_gpu_memory_used_bytes", "Memory in use, by whomever", labels=["gpu"])
        total = GaugeMetricFamily(f"{PREFIX}_gpu_memory_total_bytes", "Memory that there is", labels=["gpu"])
        for index, memory in enumerate(self._read()):
            used.add_metric([str(index)], memory.used_bytes)
            total.add_metric([str(index)], memory.total_bytes)
        return used, total
