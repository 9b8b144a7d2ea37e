"""Rows: one image being made, its place on its path, its inputs to a tick. Arrays only; calls no engine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from engines.backends.base import STEP_ROWS, STEP_SCALARS, Array
from engines.conditions import Condition
from engines.paths import Level, Step
from engines.tasks import Floats, FromImage, Inpaint, Mask, Task


class Group(NamedTuple):
    """Rows of one group may share a tick."""

    revision: str
    graph: str
    latent_shape: tuple[int, ...]


@dataclass(eq=False, slots=True)
class Row:
    """One image being made. Arrays have no batch dimension; ``z``, ``known`` and ``noise`` are (c, h, w).

    Encoding steps see ``source``, the others ``target``. ``ends`` are the two ends of its last step, None before the
    first; noise that was added after it is in neither.
    """

    task: Task
    revision: str
    path: tuple[Step, ...]
    z: Floats
    known: Floats
    keep: Floats
    noise: Floats
    target: Condition
    source: Condition
    step_index: int = 0
    ends: tuple[Floats, Floats] | None = None

    @property
    def remaining(self) -> int:
        """Steps still to run."""
        return len(self.path) - self.step_index

    @property
    def done(self) -> bool:
        """Whether the row reached the end of its path."""
        return self.remaining == 0

    @property
    def step(self) -> Step:
        """The step that comes next."""
        return self.path[self.step_index]

    @property
    def condition(self) -> Condition:
        """What the next step is conditioned on."""
        return self.source if self.step.encodes else self.target

    @property
    def estimate(self) -> Floats:
        """The clean latent (c, h, w) that the last step went towards. Raises ValueError before the first.

        A step keeps x and eps of z = alpha x + sigma eps, so its two ends give both; what was put back is known.
        """
        if self.ends is None:
            raise ValueError("no step has run yet")
        last = self.path[self.step_index - 1]
        return self.keep * self.known + (1 - self.keep) * implied_x(*self.ends, last.start, last.end)

    @property
    def group(self) -> Group:
        """What decides which rows may share a tick; a row that is done has none."""
        return Group(self.revision, self.step.graph, self.z.shape)

    def move(self, reached: Floats) -> None:
        """Take the next step, which ended at ``reached``."""
        step, index = self.step, self.step_index
        self.ends = self.z, reached
        self.step_index += 1
        self.z = reached
        if step.back is not None:
            self.z = renoise(reached, noise_of(self.task.seed, reached.shape, index + 1), step.end, step.back)


def start_row(
    task: Task,
    *,
    revision: str,
    path: tuple[Step, ...],
    condition: Condition,
    source: Condition | None,
    shape: Sequence[int],
    latent: Floats | None,
    puts_back: bool = True,
) -> Row:
    """Place ``task`` at the start of its ``path``: noise, or for tasks with an image what that has there.

    ``latent`` is the encoded image, and ``shape`` the latent's, (c, h, w): z = alpha latent + sigma noise, at the level
    where the first step begins. An inpainting that takes every step has noise alone where it repaints, as schedules
    that do not end in pure noise would let what was there show through. It ``puts_back`` what is kept after every step,
    unless its network sees it. ``source`` is the condition under which a transfer encodes.
    """
    noise = noise_of(task.seed, shape)
    row = Row(
        task=task,
        revision=revision,
        path=path,
        z=noise,
        known=np.zeros_like(noise),
        keep=np.zeros((1, *shape[1:]), dtype=np.float32),
        noise=np.zeros_like(noise),
        target=condition,
        source=condition if source is None else source,
    )
    if isinstance(task, FromImage):
        if latent is None:
            raise ValueError("editing needs the encoded image")
        alpha, sigma = path[0].start
        row.z = np.float32(alpha) * latent + np.float32(sigma) * noise
        if isinstance(task, Inpaint):
            if puts_back:
                row.known, row.noise, row.keep = latent, noise, keep_cells(task.repaint, shape)
            if len(path) == task.steps:
                row.z = row.keep * row.z + (1 - row.keep) * noise
    return row


def implied_x(z: Floats, z_next: Floats, level: Level, level_next: Level) -> Floats:
    """The x that is the same in z = alpha x + sigma eps and z_next = alpha_next x + sigma_next eps."""
    (alpha, sigma), (alpha_next, sigma_next) = level, level_next
    x: Floats = np.float32(sigma) * z_next - np.float32(sigma_next) * z
    return x / np.float32(sigma * alpha_next - sigma_next * alpha)


def renoise(z: Floats, noise: Floats, level: Level, later: Level) -> Floats:
    """A sample of q(z_t | z_s) for t later than s: (alpha_t/alpha_s) z_s plus noise (Salimans & Ho 2022, section 2)."""
    ratio = later.alpha / level.alpha
    spread = math.sqrt(max(later.sigma**2 - (ratio * level.sigma) ** 2, 0.0))
    return np.float32(ratio) * z + np.float32(spread) * noise


def noise_of(seed: int, shape: Sequence[int], index: int = 0) -> Floats:
    """Standard normal float32 noise of ``shape``, from ``seed`` (0 to MAX_SEED) and ``index`` alone.

    Index 0 is what an image starts from; i is what its i-th step adds, where its sampler adds noise.
    """
    generator = np.random.Generator(np.random.Philox(key=seed | index << 64))
    return generator.standard_normal(tuple(shape), dtype=np.float32)


class TickInputs:
    """The inputs of ticks. Rows that move together again get the same arrays again, but for their place on the grid.

    An engine on a device need not send those a second time. The arrays cannot be written to.
    """

    def __init__(self) -> None:
        """Remember no tick yet."""
        self._last: tuple[list[tuple[Floats, Condition]], dict[str, Array]] | None = None

    def of(self, rows: Sequence[Row]) -> dict[str, Array]:
        """The inputs of a tick of rows of one group."""
        last = self._last
        if last is not None and len(rows) == len(last[0]) and all(map(_is_as_left, rows, last[0])):
            return _scalars(rows) | last[1]
        return step_inputs(rows)

    def move(self, rows: Sequence[Row], inputs: Mapping[str, Array], z_next: Array) -> None:
        """Move the rows to `z_next`, which a tick with `inputs` gave."""
        conditions = [row.condition for row in rows]
        noised = any(row.step.back is not None for row in rows)
        z_next.flags.writeable = False
        for row, reached in zip(rows, z_next, strict=True):
            row.move(reached)
        if noised:
            z_next = np.stack([row.z for row in rows])
            z_next.flags.writeable = False
            for row, z in zip(rows, z_next, strict=True):
                row.z = z
        kept = {name: array for name, array in inputs.items() if name not in STEP_SCALARS}
        left = [(row.z, condition) for row, condition in zip(rows, conditions, strict=True)]
        self._last = left, {**kept, "z": z_next}


def _is_as_left(row: Row, left: tuple[Floats, Condition]) -> bool:
    """Whether a row is where the last tick left it, and is conditioned on the same again."""
    return row.z is left[0] and row.condition is left[1]


def step_inputs(rows: Sequence[Row]) -> dict[str, Array]:
    """Stack rows of one group into the inputs of their step graph."""
    inputs = _scalars(rows)
    for name in STEP_ROWS:
        inputs[name] = np.stack([getattr(row, name) for row in rows])
    for name in rows[0].condition:
        inputs[name] = np.stack([row.condition[name] for row in rows])
    for array in inputs.values():
        array.flags.writeable = False
    return inputs


def _scalars(rows: Sequence[Row]) -> dict[str, Array]:
    steps = [row.step for row in rows]
    columns = zip(*((step.time, *step.start, *step.end, step.w) for step in steps), strict=True)
    return {name: np.array(column, dtype=np.float32) for name, column in zip(STEP_SCALARS, columns, strict=True)}


def keep_cells(repaint: Mask, latent_shape: Sequence[int]) -> Floats:
    """The ``keep`` input (1, h, w): 1 where every pixel under a latent cell is kept, else 0."""
    _, height, width = latent_shape
    blocks = repaint.reshape(height, repaint.shape[0] // height, width, repaint.shape[1] // width)
    kept = np.logical_not(blocks.any(axis=(1, 3)))
    return np.asarray(kept, dtype=np.float32)[None]
