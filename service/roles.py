"""What a process of the service opens, by its settings: which queue and rates, and a bundle with engines or without."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from engines.bundle import steady_bundle
from engines.pipeline import Pipeline
from service.jobs import EXPIRED, Outcome, ending
from service.models.opening import open_pipeline
from service.queue.base import Bounds, JobQueue
from service.queue.memory import MemoryQueue
from service.runtime import OpenPipeline
from service.security.rates import Rates, TokenBuckets
from service.settings import MEMORY, Role, Settings
from service.telemetry.metrics import Metrics


def open_queue(settings: Settings, metrics: Metrics) -> JobQueue:
    """The queue that the settings name. A Redis is not called yet, so one that is away is not an error here."""
    bounds = Bounds(settings.max_results, settings.max_result_bytes)
    count_untaken = partial(_count, metrics, EXPIRED)
    if settings.queue == MEMORY:
        return MemoryQueue(settings.max_queue_cost, bounds=bounds, on_untaken=count_untaken)
    # Imported late: a service with its queue in memory needs no Redis client.
    from service.queue.redis import RedisQueue

    return RedisQueue(
        settings.queue,
        settings.max_queue_cost,
        bounds=bounds,
        reclaim_after_s=settings.reclaim_after_s,
        on_redelivery=metrics.redeliveries.inc,
        on_dead_letter=partial(_count_dead_letter, metrics),
        on_late_outcome=partial(_count, metrics),
        on_untaken=count_untaken,
    )


def _count(metrics: Metrics, outcome: Outcome) -> None:
    metrics.jobs.labels(ending(outcome)).inc()


def _count_dead_letter(metrics: Metrics) -> None:
    metrics.dead_letters.inc()
    metrics.jobs.labels("engine").inc()


def open_rates(settings: Settings) -> Rates:
    """Where the rates of API keys are counted: where the queue is, so by all processes that share one."""
    if settings.queue == MEMORY:
        return TokenBuckets(time.monotonic)
    from service.queue.rates import RedisRates

    return RedisRates(settings.queue)


def opener_of(role: Role) -> OpenPipeline:
    """How a process of this role opens its bundle: who makes no images needs no engines."""
    return open_front if role == "api" else open_pipeline


def open_front(settings: Settings, path: Path) -> Pipeline:
    """The bundle without its engines: enough to describe it, and to check tasks against it."""
    with steady_bundle(path) as bundle:
        pipeline = Pipeline(bundle, {})
    return pipeline
