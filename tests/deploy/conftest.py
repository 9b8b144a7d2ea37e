"""What the tests of the deployment share: its files, the metrics that there are, and the tools that judge files."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pytest
from fastapi import APIRouter
from fastapi.routing import APIRoute
from prometheus_client.metrics import MetricWrapperBase

import service.routes
from service.models.loaded import ModelState
from service.queue.base import QueueStats
from service.routes import models
from service.telemetry.gpus import GpuMemory
from service.telemetry.metrics import Metrics
from tests.deploy.promql import filters

RunTool = Callable[..., None]


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).parents[2]


@pytest.fixture(scope="session")
def exported() -> dict[str, frozenset[str]]:
    """The labels of every sample that the service exports, by the sample's name."""
    metrics = Metrics()
    metrics.watch_queue(lambda: QueueStats(0, 0, 0.0))
    metrics.watch_gpus(lambda: (GpuMemory(0, 1),))
    metrics.watch_models(lambda: (ModelState("tiny", "1", True, False, 0, 0),))
    for metric in vars(metrics).values():
        # A metric with labels exports nothing until it was counted once.
        if isinstance(metric, MetricWrapperBase) and metric._labelnames:
            metric.labels(*metric._labelnames)
    samples = [sample for family in metrics.registry.collect() for sample in family.samples]
    return {sample.name: frozenset(sample.labels) for sample in samples}


@pytest.fixture(scope="session")
def misfiltered(exported: dict[str, frozenset[str]]) -> Callable[[str], set[str]]:
    """What an expression gets wrong about requests for images: metrics of other endpoints too, or not of all."""
    modules = [import_module(f"service.routes.{module.name}") for module in iter_modules(service.routes.__path__)]
    routers = [each for module in modules for each in vars(module).values() if isinstance(each, APIRouter)]
    routes = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]
    wanted = {route.name for route in routes if "POST" in route.methods and route not in models.router.routes}
    assert {"generate", "edit", "inpaint"} < wanted
    others = {route.name for route in routes} - wanted

    def wrong(expression: str) -> set[str]:
        asked = {(name, of) for name, of in filters(expression, "endpoint") if "endpoint" in exported.get(name, ())}
        return {
            f"{name}: {of}"
            for name, of in asked
            if of is None or {each for each in wanted | others if re.fullmatch(of, each)} != wanted
        }

    return wrong


@pytest.fixture(scope="session")
def run_tool(root: Path) -> RunTool:
    """Runs a tool in the repository, and fails with what it printed; skips where there is no such tool."""

    def run(name: str, *arguments: str) -> None:
        beside = Path(sys.executable).with_name(name)
        found = str(beside) if beside.exists() else shutil.which(name)
        if found is None:
            pytest.skip(f"{name} is not installed, so this was not run: {' '.join((name, *arguments))}")
        ended = subprocess.run([found, *arguments], cwd=root, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr

    return run
