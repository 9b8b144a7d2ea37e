"""How a bundle is opened for the service: batch sizes, threads, a warm-up."""

from __future__ import annotations

from pathlib import Path

from engines.backends import AUTO
from engines.backends.cores import usable_cores
from engines.pipeline import Pipeline
from engines.plans import batch_sizes_up_to
from service.settings import Settings


def default_threads() -> int:
    """One fewer than the cores the process may use: HTTP, images and text have that one, or all are slower."""
    return max(1, usable_cores() - 1)


def lone_threads(settings: Settings) -> int:
    """Of a row that runs alone: both cores where there are two, where one more of many is not worth the memory.

    0, as many as others have, where the settings say how many, and on backends that hold no graph twice for it.
    """
    cores = usable_cores()
    return cores if cores == 2 and not settings.threads and settings.backend in (AUTO, "ort") else 0


def open_pipeline(settings: Settings, path: Path) -> Pipeline:
    """Open the bundle in folder ``path`` as the settings want it, and warm it up."""
    sizes = batch_sizes_up_to(settings.max_batch)
    threads, lone = settings.threads or default_threads(), lone_threads(settings)
    pipeline = Pipeline.open(path, settings.backend, threads, sizes, settings.precision, settings.plans, lone)
    pipeline.warmup()
    return pipeline
