"""How a bundle is opened for the service: batch sizes, threads, a warm-up."""

from __future__ import annotations

from pathlib import Path

from engines.backends.cores import usable_cores
from engines.pipeline import Pipeline
from engines.plans import batch_sizes_up_to
from service.settings import Settings


def default_threads() -> int:
    """One fewer than the cores the process may use: HTTP, images and text have that one, or all are slower."""
    return max(1, usable_cores() - 1)


def open_pipeline(settings: Settings, path: Path) -> Pipeline:
    """Open the bundle in folder ``path`` as the settings want it, and warm it up."""
    sizes = batch_sizes_up_to(settings.max_batch)
    threads = settings.threads or default_threads()
    pipeline = Pipeline.open(path, settings.backend, threads, sizes, settings.precision, settings.plans)
    pipeline.warmup()
    return pipeline
