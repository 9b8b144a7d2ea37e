"""Fixtures that several parts share: a tiny run on real digits, trained once a session."""

from __future__ import annotations

import gc
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock
from hypothesis import settings

if TYPE_CHECKING:
    from training.run import Run

# The tests state what the CPU does. accelerate allows one device in a process, and commands take the best one.
os.environ["ACCELERATE_USE_CPU"] = "true"

# Networks this small gain nothing from more threads, which wait for each other where the cores are busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A busy machine is not a fault: time is measured in benchmarks, not in tests.
settings.register_profile("fewstep", deadline=None)
settings.load_profile("fewstep")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """No quick test may hang the suite; slow ones take what they need. Files that train go out first, being longest."""
    items.sort(key=lambda item: "training" not in item.path.parts)
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(0))


def pytest_collection_finish() -> None:
    """What was imported stays: full collections, of which every training has some, need not look at it again."""
    gc.collect()
    gc.freeze()


TINY_DIGITS = """
name = "tiny-digits"
conditioning = "class"
data = { source = "digits", size = 8 }
network = { channels = [16, 32], norm_groups = 8 }
teacher = { updates = 400, batch_size = 32, learning_rate = 4e-3, warmup = 20, ema = 0.97 }
stage1 = { updates = 250, batch_size = 32, learning_rate = 2e-3 }
export = { licence = "CC-BY-4.0", steps = [4, 2, 1] }

[stage2]
start = 8
rounds = [
    { steps = 4, updates = 100, batch_size = 32, learning_rate = 2e-3 },
    { steps = 2, updates = 100, batch_size = 32, learning_rate = 2e-3 },
    { steps = 1, updates = 100, batch_size = 32, learning_rate = 2e-3 },
]
"""


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe file that trains both stages on digits in about a minute."""
    path = tmp_path_factory.mktemp("recipe") / "tiny-digits.toml"
    path.write_text(TINY_DIGITS)
    return path


@pytest.fixture(scope="session")
def digits_run(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """That recipe's run, every stage done: trained once for all processes of the session, a copy for each."""
    from accelerate import Accelerator

    from training import distill
    from training.recipe import Recipe
    from training.run import Run

    recipe, ours = Recipe.load(tiny_recipe), tmp_path_factory.mktemp("run")
    session = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        session = session.parent
    with FileLock(session / "tiny-digits.lock"):
        trained = Run(recipe, session / "tiny-digits", Accelerator(cpu=True))
        distill.distill(trained)
    shutil.copytree(trained.folder, ours, dirs_exist_ok=True)
    return Run(recipe, ours, Accelerator(cpu=True))
