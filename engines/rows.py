"""Rows: one image being made, its start on the grid, its inputs to a tick. Arrays only; calls no engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from engines.backends.base import Array
from engines.manifest import Student
from engines.tasks import Edit, Floats, Inpaint, Mask, Task, kept_steps


class Group(NamedTuple):
    """Rows of one group may share a tick."""

    revision: str
    steps: int
    latent_shape: tuple[int, ...]


@dataclass(eq=False, slots=True)
class Row:
    """One image being made. Arrays have no batch dimension; ``z``, ``known`` and ``noise`` are (c, h, w).

    ``z_before`` is what its last step started from, None before the first.
    """

    task: Task
    revision: str
    student: Student
    z: Floats
    step_index: int
    known: Floats
    keep: Floats
    noise: Floats
    condition: dict[str, Array]
    z_before: Floats | None = None

    @property
    def remaining(self) -> int:
        """Steps still to run."""
        return self.student.steps - self.step_index

    @property
    def done(self) -> bool:
        """Whether the row reached the end of its grid."""
        return self.remaining == 0

    @property
    def estimate(self) -> Floats:
        """The clean latent (c, h, w) that the last step went towards. Raises ValueError before the first.

        A deterministic step keeps x and eps of z = alpha x + sigma eps, so its two ends give both.
        """
        if self.z_before is None:
            raise ValueError("no step has run yet")
        grid, k = self.student.grid, self.step_index
        return implied_x(
            self.z_before,
            self.z,
            alphas=(grid.alphas[k - 1], grid.alphas[k]),
            sigmas=(grid.sigmas[k - 1], grid.sigmas[k]),
        )

    @property
    def group(self) -> Group:
        """What decides which rows may share a tick."""
        return Group(self.revision, self.student.steps, self.z.shape)


def start_row(
    task: Task,
    *,
    revision: str,
    student: Student,
    condition: dict[str, Array],
    shape: Sequence[int],
    latent: Floats | None,
) -> Row:
    """Place ``task`` at its start: noise, or for edit and inpaint its encoded image ``latent`` renoised.

    ``shape`` is the latent's, (c, h, w). z_k = alpha_k latent + sigma_k noise, k the first step that runs.
    """
    noise = initial_noise(task.seed, shape)
    row = Row(
        task=task,
        revision=revision,
        student=student,
        z=noise,
        step_index=0,
        known=np.zeros_like(noise),
        keep=np.zeros((1, *shape[1:]), dtype=np.float32),
        noise=np.zeros_like(noise),
        condition=condition,
    )
    if isinstance(task, Edit | Inpaint):
        if latent is None:
            raise ValueError("editing needs the encoded image")
        k = student.steps - kept_steps(student.steps, task.strength)
        row.step_index = k
        row.z = np.float32(student.grid.alphas[k]) * latent + np.float32(student.grid.sigmas[k]) * noise
        if isinstance(task, Inpaint):
            row.known, row.noise, row.keep = latent, noise, keep_cells(task.repaint, shape)
    return row


def implied_x(z: Floats, z_next: Floats, *, alphas: tuple[float, float], sigmas: tuple[float, float]) -> Floats:
    """The x that is the same in z = alpha x + sigma eps and z_next = alpha_next x + sigma_next eps."""
    (alpha, alpha_next), (sigma, sigma_next) = alphas, sigmas
    x: Floats = np.float32(sigma) * z_next - np.float32(sigma_next) * z
    return x / np.float32(sigma * alpha_next - sigma_next * alpha)


def initial_noise(seed: int, shape: Sequence[int]) -> Floats:
    """Standard normal float32 noise of ``shape``, from ``seed`` (0 to MAX_SEED) alone."""
    return np.random.Generator(np.random.Philox(key=seed)).standard_normal(tuple(shape), dtype=np.float32)


class TickInputs:
    """The inputs of ticks. Rows that move together again get the same arrays again, but for their place on the grid.

    An engine on a device need not send those a second time. The arrays cannot be written to.
    """

    def __init__(self) -> None:
        """Remember no tick yet."""
        self._last: tuple[tuple[Floats, ...], dict[str, Array]] | None = None

    def of(self, rows: Sequence[Row]) -> dict[str, Array]:
        """The inputs of a tick of rows of one group."""
        last = self._last
        if last is not None and len(rows) == len(last[0]) and all(map(_is_z_of, rows, last[0])):
            return _scalars(rows) | last[1]
        return step_inputs(rows)

    def move(self, rows: Sequence[Row], inputs: Mapping[str, Array], z_next: Array) -> None:
        """Move the rows to `z_next`, which a tick with `inputs` gave."""
        z_next.flags.writeable = False
        for row, z in zip(rows, z_next, strict=True):
            row.z_before, row.z = row.z, z
            row.step_index += 1
        kept = {name: array for name, array in inputs.items() if name not in SCALARS}
        self._last = tuple(row.z for row in rows), {**kept, "z": z_next}


def _is_z_of(row: Row, z: Floats) -> bool:
    return row.z is z


SCALARS = ("time", "alpha", "sigma", "alpha_next", "sigma_next", "guidance")


def step_inputs(rows: Sequence[Row]) -> dict[str, Array]:
    """Stack rows of one group into the inputs of their step graph."""
    inputs = _scalars(rows)
    for name in ("z", "known", "keep", "noise"):
        inputs[name] = np.stack([getattr(row, name) for row in rows])
    for name in rows[0].condition:
        inputs[name] = np.stack([row.condition[name] for row in rows])
    for array in inputs.values():
        array.flags.writeable = False
    return inputs


def _scalars(rows: Sequence[Row]) -> dict[str, Array]:
    grids = [(row.student.grid, row.step_index) for row in rows]
    values = (
        [grid.times[k] for grid, k in grids],
        [grid.alphas[k] for grid, k in grids],
        [grid.sigmas[k] for grid, k in grids],
        [grid.alphas[k + 1] for grid, k in grids],
        [grid.sigmas[k + 1] for grid, k in grids],
        [row.task.guidance for row in rows],
    )
    return {name: np.array(column, dtype=np.float32) for name, column in zip(SCALARS, values, strict=True)}


def keep_cells(repaint: Mask, latent_shape: Sequence[int]) -> Floats:
    """The ``keep`` input (1, h, w): 1 where every pixel under a latent cell is kept, else 0."""
    _, height, width = latent_shape
    blocks = repaint.reshape(height, repaint.shape[0] // height, width, repaint.shape[1] // width)
    kept = np.logical_not(blocks.any(axis=(1, 3)))
    return np.asarray(kept, dtype=np.float32)[None]
