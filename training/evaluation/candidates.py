"""The networks of a run as an evaluation sees them: what makes images, in how many calls, and the images made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from training.draws import ADDED_NOISE_STREAM, NOISE_STREAM, generator_at
from training.errors import TrainingError
from training.evaluation.evaluation_set import EvaluationSet
from training.evaluation.features import Pixels
from training.guidance import Denoiser
from training.pictures import to_uint8
from training.run import Run
from training.sampler import fresh_from, sample_stochastic
from training.solvers import SOLVER_NAMES, SOLVERS, Solver, sample_with
from training.stages import AUTOENCODER, TEACHER, student_stage
from training.store import Store

# To be raised when a change of the code changes the images that it makes of the same inputs.
VERSION = 2
MOST_IMAGES, PIXELS_AT_ONCE = 256, 1 << 18


@dataclass(frozen=True)
class Candidate:
    """A network of the run, the steps that it is sampled in, and how; a student's own steps are those of DDIM.

    The stochastic sampler of N steps is that of the student of N / 2 steps.
    """

    model: Literal["teacher", "student"]
    steps: int
    sampler: Solver | Literal["stochastic"] = "ddim"

    def __post_init__(self) -> None:
        """Raise ValueError for a teacher that samples stochastically, or a student with a teacher's solver."""
        if self.sampler not in (SOLVERS if self.model == "teacher" else ("ddim", "stochastic")):
            raise ValueError(f"a {self.model} does not take the steps of {self.sampler}")

    @property
    def name(self) -> str:
        """What it is called under pictures."""
        how = "" if self.model == "student" and self.sampler == "ddim" else f", {SOLVER_NAMES[self.sampler]}"
        return f"{self.model}{how}, {self.steps} step{'s' if self.steps > 1 else ''}"

    @property
    def stage(self) -> str:
        """The stage of the run that trained it."""
        if self.model == "teacher":
            return TEACHER
        return student_stage(self.steps // 2 if self.sampler == "stochastic" else self.steps)

    @property
    def calls(self) -> int:
        """Network calls an image: guidance costs the teacher a second one a step, a student none."""
        return 2 * self.steps if self.model == "teacher" else self.steps


def trained_students(run: Run) -> tuple[int, ...]:
    """The step counts of the students that the run has finished, most steps first."""
    steps = (round_.steps for round_ in run.recipe.stage2.rounds)
    return tuple(sorted((n for n in steps if run.is_done(student_stage(n))), reverse=True))


class ImageMaker:
    """Makes the images of candidates for the conditions of an evaluation, and keeps them batch by batch.

    The noise of image i is drawn from (seed, i), so all candidates start from the same. Networks are loaded when
    there is something to make.
    """

    def __init__(self, run: Run, data: EvaluationSet, seed: int, store: Store) -> None:
        """Images are made with the networks of `run`, and kept in `store`."""
        self.run, self.data, self.seed, self.store = run, data, seed, store
        self._denoisers: dict[str, Denoiser] = {}
        self._hashes: dict[str, str] = {}
        size = rows_at_once(run.shape)
        self._batches = [range(start, min(start + size, len(data))) for start in range(0, len(data), size)]

    def missing_calls(self, candidate: Candidate, w: float) -> int:
        """How many network calls its images still need, one call on n images counted as n."""
        keys = ((rows, self._key(candidate, w, rows)) for rows in self._batches)
        return candidate.calls * sum(len(rows) for rows, key in keys if not self.store.has_array("images", key))

    def images(self, candidate: Candidate, w: float, progress: Callable[[int], Any] = lambda calls: None) -> Pixels:
        """The images (N, H, W, 3) for all N conditions; `progress` is told how many calls each batch needed."""
        return np.concatenate([self._batch(candidate, w, rows, progress) for rows in self._batches])

    def _batch(self, candidate: Candidate, w: float, rows: range, progress: Callable[[int], Any]) -> Pixels:
        def make() -> Pixels:
            made = self.make(candidate, w, rows)
            progress(candidate.calls * len(rows))
            return made

        return self.store.array("images", self._key(candidate, w, rows), make)

    def make(self, candidate: Candidate, w: float, rows: range) -> Pixels:
        """The images (len(rows), H, W, 3) for some of the conditions, made now and not kept."""
        device = self.run.device
        noise = torch.stack([self._noise(i) for i in rows]).to(device)
        condition = {name: value[rows.start : rows.stop].to(device) for name, value in self.data.condition.items()}
        w_of_rows = torch.full((len(rows),), w, device=device)
        denoiser, schedule = self._denoiser(candidate), self.run.schedule
        with self.run.accelerator.autocast():
            if candidate.sampler == "stochastic":
                added = fresh_from(generator_at(self.seed, rows.start, ADDED_NOISE_STREAM))
                z = sample_stochastic(denoiser, schedule.grid(candidate.steps), noise, condition, w_of_rows, added)
            else:
                z = sample_with(candidate.sampler, denoiser, schedule, candidate.steps, noise, condition, w_of_rows)
        images = self.run.decoded(z)
        if not images.isfinite().all():
            raise TrainingError(f"{candidate.name} at w = {w:g}: its images have values that are not finite")
        return to_uint8(images)

    def weights(self, stage: str) -> str:
        """The hash of a stage's weights. Raises TrainingError if the stage is not done."""
        if stage not in self._hashes:
            self._hashes[stage] = self.run.weights(stage)
        return self._hashes[stage]

    def _noise(self, i: int) -> Tensor:
        return torch.randn(self.run.shape, generator=generator_at(self.seed, i, NOISE_STREAM))

    def _denoiser(self, candidate: Candidate) -> Denoiser:
        if candidate.stage not in self._denoisers:
            teacher = candidate.model == "teacher"
            self._denoisers[candidate.stage] = (
                self.run.guided_teacher() if teacher else self.run.compiled(self.run.denoiser(candidate.stage))
            )
        return self._denoisers[candidate.stage]

    def _key(self, candidate: Candidate, w: float, rows: range) -> dict[str, Any]:
        return {
            "version": VERSION,
            "precision": arithmetic(self.run),
            "weights": self.weights(candidate.stage),
            "autoencoder": self.weights(AUTOENCODER) if self.run.is_latent else None,
            "model": candidate.model,
            "sampler": candidate.sampler,
            "steps": candidate.steps,
            "w": w,
            "seed": self.seed,
            "rows": [rows.start, rows.stop],
            "conditions": self.data.words[rows.start : rows.stop],
            "encoding": self.data.encoding,
        }


def arithmetic(run: Run) -> str:
    """What networks compute in: on a GPU torch convolves float32 in TF32 unless it is told not to."""
    in_tf32 = run.device.type == "cuda" and run.recipe.precision == "fp32" and torch.backends.cudnn.allow_tf32
    return f"{run.recipe.precision}{', convolutions in TF32' if in_tf32 else ''}"


def rows_at_once(shape: tuple[int, int, int]) -> int:
    """Images whose z (c, h, w) pass a network together: few enough for a large one, enough to keep a GPU busy."""
    return max(1, min(MOST_IMAGES, PIXELS_AT_ONCE // (shape[1] * shape[2])))
