"""The path of an image: which graphs take it from where to where. Pure functions of a task and a manifest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from engines.manifest import Description, Grid
from engines.tasks import Task, Transfer, ticks


class Level(NamedTuple):
    """How much of a latent is image and how much is noise: z = alpha x + sigma eps."""

    alpha: float
    sigma: float


@dataclass(frozen=True, slots=True)
class Step:
    """One call of a step graph at ``time``, with guidance ``w``: from one level to another.

    Fresh noise then takes the latent ``back`` to a noisier level, where there is one. A step that ``encodes`` sees the
    condition of the image that the task begins with.
    """

    graph: str
    time: float
    w: float
    start: Level
    end: Level
    back: Level | None = None
    encodes: bool = False


def path_of(task: Task, manifest: Description) -> tuple[Step, ...]:
    """Every step of a task's image, the first one first. Raises ValueError for a task that `check_task` refuses."""
    student = manifest.find_student(task.steps, task.sampler)
    grid = None if student is None else student.grid_of(task.sampler)
    if student is None or grid is None:
        raise ValueError(f"no student for {task.steps} steps of the {task.sampler} sampler")
    if not isinstance(task, Transfer):
        reach = 2 if task.sampler == "stochastic" else 1
        return tuple(_decoding(student.graph, grid, task.guidance, task.steps - ticks(task), reach))
    if student.encoder is None:
        raise ValueError(f"the student of {task.steps} steps has no encoder")
    # An image encodes to its own noise best where guidance pulls it least.
    there = _encoding(student.encoder, grid, manifest.guidance.minimum)
    return (*there, *_decoding(student.graph, grid, task.guidance))


def _decoding(graph: str, grid: Grid, w: float, start: int = 0, reach: int = 1) -> Iterator[Step]:
    """From place ``start`` of the grid to its end: each step ``reach`` places on, then back to the next place."""
    levels = _levels(grid)
    for k in range(start, grid.steps):
        end = min(k + reach, grid.steps)
        yield Step(graph, grid.times[k], w, levels[k], levels[end], back=None if end == k + 1 else levels[k + 1])


def _encoding(graph: str, grid: Grid, w: float) -> Iterator[Step]:
    """From the end of the grid to its start."""
    levels = _levels(grid)
    for k in range(grid.steps, 0, -1):
        yield Step(graph, grid.times[k], w, levels[k], levels[k - 1], encodes=True)


def _levels(grid: Grid) -> list[Level]:
    return [Level(alpha, sigma) for alpha, sigma in zip(grid.alphas, grid.sigmas, strict=True)]
