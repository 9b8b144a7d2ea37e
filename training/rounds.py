"""The table of rounds: how near each student is to its teacher, and to the guided teacher, at equal noise.

Its first row is that of stage 1: what is lost there, no round brings back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from training.diffusion import Schedule
from training.draws import VALIDATION_STREAM, Draws, generator_at
from training.errors import TrainingError
from training.guidance import Condition, Denoiser
from training.losses import Batch, stochastic_step, target_along
from training.run import Run
from training.sampler import encode, fresh_from, sample, sample_stochastic
from training.store import whole_file

ROWS = 32
ROWS_AT_ONCE = 16
SHARDS = 4
LEAST_REFERENCE_STEPS = 64
TABLE, FIGURES = "rounds.md", "rounds.json"


@dataclass(frozen=True)
class Trial:
    """Fixed noise, data, conditions and w, on which samplers, or encoders, are compared."""

    run: Run
    encoding: bool
    noise: Tensor
    batch: Batch
    w: Tensor

    @classmethod
    def of(cls, run: Run, encoding: bool) -> Trial:
        """Conditions of the training split, of a stream from a few shards of it, w over the whole range."""
        draws = Draws(run.recipe.seed, 1, range(ROWS))
        batch = run.data.batch(draws.integers(len(run.data.excerpt(SHARDS))), draws, run.device)
        w = torch.linspace(*run.recipe.guidance, ROWS, device=run.device)
        return cls(run, encoding, draws.normal(batch.x), batch, w)

    def result(self, denoiser: Denoiser, steps: int) -> Tensor:
        """Clean data (B, *) from the noise, or for encoders noise from the data, in so many deterministic steps."""
        grid = self.run.schedule.grid(steps)
        along, start = (encode, self.batch.x) if self.encoding else (sample, self.noise)
        parts = []
        for rows, condition in self._parts():
            with self.run.accelerator.autocast():
                parts.append(along(denoiser, grid, start[rows], condition, self.w[rows]))
        return torch.cat(parts)

    def noisy_result(self, denoiser: Denoiser, steps: int) -> Tensor:
        """Clean data (B, *) from the noise by the stochastic sampler, for a student of so many steps."""
        grid, parts = self.run.schedule.grid(2 * steps), []
        fresh = fresh_from(generator_at(self.run.recipe.seed, 1, VALIDATION_STREAM))
        for rows, condition in self._parts():
            with self.run.accelerator.autocast():
                parts.append(sample_stochastic(denoiser, grid, self.noise[rows], condition, self.w[rows], fresh))
        return torch.cat(parts)

    def _parts(self) -> Iterator[tuple[slice, Condition]]:
        """The rows that are sampled at once, and their conditions."""
        for first in range(0, ROWS, ROWS_AT_ONCE):
            rows = slice(first, first + ROWS_AT_ONCE)
            yield rows, {name: value[rows] for name, value in self.batch.condition.items()}

    def from_teacher(
        self, teacher: Denoiser, teacher_steps: int, steps: int, stochastic: bool
    ) -> Callable[[Denoiser], float]:
        """Takes the relative L2 distance of a student of `steps` steps from the teacher that it replaces.

        A stochastic one is compared along the stochastic sampler, which asks it at 2 `steps` places, with a teacher
        that takes two deterministic steps for each of its own.
        """
        if not stochastic:
            target = self.result(teacher, teacher_steps)
            return lambda student: self.distance(student, steps, target)
        noisy = self.noisy_result(_two_steps(teacher, self.run.schedule, steps), steps)
        return lambda student: _apart(self.noisy_result(student, steps), noisy)

    @property
    def reference_steps(self) -> int:
        """Many steps: no fewer than those that a ladder of the run starts from."""
        ladders = (self.run.recipe.stage2, self.run.recipe.encoder)
        return max(LEAST_REFERENCE_STEPS, *(ladder.start for ladder in ladders if ladder))

    @cached_property
    def reference(self) -> Tensor:
        """What the guided teacher makes in many steps."""
        return self.result(self.run.guided_teacher(), self.reference_steps)

    def distance(self, denoiser: Denoiser, steps: int, target: Tensor) -> float:
        """The relative L2 distance from the target of what the denoiser makes in so many steps."""
        return _apart(self.result(denoiser, steps), target)


def _apart(made: Tensor, target: Tensor) -> float:
    return float((made - target).norm() / target.norm())


def _two_steps(teacher: Denoiser, schedule: Schedule, steps: int) -> Denoiser:
    """The two steps of a teacher that one of a stochastic student of `steps` steps replaces, as one prediction."""

    def v(z: Tensor, t: Tensor, condition: Condition, w: Tensor) -> Tensor:
        return target_along(teacher, schedule, z, stochastic_step(t, steps), condition, w)

    return v


@dataclass(frozen=True)
class RoundRow:
    """One round, or stage 1 at the steps that the first round starts from: what was trained, and how near it came.

    Distances are relative L2 at equal noise. That to the teacher is taken by the sampler that the student is for, the
    others by the deterministic one. `kept` is the update whose student was kept: the last of all `updates`, or with
    validations the best.
    """

    stage: str
    steps: int
    updates: int | None
    kept: int | None
    images: int | None
    skipped: int | None
    to_its_teacher: float
    to_guided_teacher: float
    guided_ddim: float
    reference_steps: int


def record(
    run: Run, stage: str, trial: Trial, student: Denoiser, steps: int, from_teacher: Callable[[Denoiser], float]
) -> None:
    """Add the row of stage 1 or of a round, which is done, to the run's table. One that is repeated replaces its row.

    `from_teacher` takes the student's distance from its teacher.
    """
    if not run.accelerator.is_main_process:
        return
    log = _last_line(run, stage)
    row = RoundRow(
        stage, steps, log.get("update"), log.get("kept"), log.get("images"), log.get("skipped"),
        from_teacher(student), trial.distance(student, steps, trial.reference),
        trial.distance(run.guided_teacher(), steps, trial.reference), trial.reference_steps,
    )  # fmt: skip
    path = run.folder / FIGURES
    rows = [other for other in _rows(run) if other["stage"] != stage] + [asdict(row)]
    for file, text in ((path, json.dumps(rows, indent=1)), (run.folder / TABLE, to_markdown(rows))):
        with whole_file(file) as partial:
            partial.write_text(text)


def has_row(run: Run, stage: str) -> bool:
    """Whether the table has the row of a stage."""
    return stage in [row["stage"] for row in _rows(run)]


def _rows(run: Run) -> list[dict[str, Any]]:
    """The rows so far. Raises TrainingError for a file that holds none."""
    path = run.folder / FIGURES
    if not path.exists():
        return []
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text())
        assert all(isinstance(row["stage"], str) for row in rows)
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise TrainingError(f"{path} is damaged; without it, its rows are made anew") from error
    return rows


def _last_line(run: Run, stage: str) -> dict[str, Any]:
    """What the log of a stage says of its end; nothing if a full disk left none, or half a line."""
    path = run.folder / stage / "log.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    try:
        last: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    except ValueError:
        return {}
    return last


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """The table of rounds."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "stage": lambda row: row["stage"],
        "steps": lambda row: str(row["steps"]),
        "updates": lambda row: str(row["updates"]),
        "update kept": lambda row: str(row.get("kept")),
        "images": lambda row: str(row["images"]),
        "skipped updates": lambda row: str(row["skipped"]),
        "to its teacher": lambda row: f"{row['to_its_teacher']:.4f}",
        "to the guided teacher": lambda row: f"{row['to_guided_teacher']:.4f}",
        "guided DDIM at equal steps": lambda row: f"{row['guided_ddim']:.4f}",
    }
    lines = [f"| {' | '.join(columns)} |", f"|{'--|' * len(columns)}"]
    lines += [f"| {' | '.join(show(row) for show in columns.values())} |" for row in rows]
    steps = rows[0]["reference_steps"]
    return (
        f"Relative L2 distances at equal noise, condition and w, over {ROWS} rows with w over the whole range. Its "
        "teacher is the student of the round before, at first that of stage 1, and that one's the guided teacher at "
        f"equal steps; a stochastic student goes by its own sampler there. The guided teacher takes {steps} steps.\n\n"
        + "\n".join(lines)
        + "\n"
    )
