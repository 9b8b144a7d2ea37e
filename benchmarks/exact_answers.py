"""Both stages against exact answers: the teacher is the guided denoiser of a Gaussian mixture, in closed form.

Stage 1 is compared with the exact guided output; stage 2 with the ODE map solved to 1e-6, beside guided DDIM at
equal steps. All figures are relative L2 errors on draws that were not trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from training.diffusion import Schedule, diffuse, x_from_v
from training.draws import Draws, generator_at
from training.guidance import Condition, Denoiser, GuidedTeacher
from training.loop import train
from training.losses import Batch, Course, draw_any_times, draw_guidance, output_matching_loss, progressive_loss
from training.mixture import ExactDenoiser, GaussianMixture, solve_guided_ode
from training.sampler import encode, sample
from training.sections import Optimisation
from training.vectors import VectorDenoiser

W_RANGE = (0.0, 4.0)
START = 64
TEST_ROWS = 2048
LAST_ENCODER = 4
TEST_PLACE = 2**31  # past every update


@dataclass(frozen=True)
class Effort:
    """How much is trained: updates of stage 1, of each halving, of the last two, and of the last one if not as many."""

    stage1: int
    halving: int
    last: int
    to_one: int | None = None
    batch_size: int = 512
    learning_rate: float = 2e-3

    def updates(self, steps: int) -> int:
        """Of the halving to so many steps."""
        if steps == 1 and self.to_one is not None:
            return self.to_one
        return self.last if steps <= 2 else self.halving

    def optimisation(self, updates: int, share: float = 1.0) -> Optimisation:
        """A stage's optimisation."""
        return Optimisation(
            updates=updates, batch_size=self.batch_size, learning_rate=share * self.learning_rate, decay="linear",
            warmup=min(100, updates // 10),
        )  # fmt: skip


SHORT = Effort(stage1=4500, halving=300, last=1000)
LONG = Effort(stage1=30_000, halving=3000, last=10_000)


class Problem:
    """A mixture with its exact guided teacher, and what is asked of students."""

    def __init__(self, dimensions: int, folder: Path) -> None:
        """In so many dimensions; logs go to `folder`."""
        self.mixture, self.schedule, self.folder = GaussianMixture.on_a_circle(dimensions), Schedule.cosine(), folder
        exact = ExactDenoiser(self.mixture, self.schedule)
        self.teacher = GuidedTeacher(exact, exact, {"label": torch.tensor(self.mixture.classes)})
        self.dimensions = dimensions

    def batch(self, place: int, rows: int) -> Batch:
        """Fresh data, others at every place."""
        x, label = self.mixture.draw(rows, generator_at(0, place, 6))
        return Batch(x.float(), {"label": label})

    def match_outputs(self, effort: Effort) -> VectorDenoiser:
        """Stage 1."""
        torch.manual_seed(0)
        network = VectorDenoiser(self.dimensions, self.mixture.classes)

        def loss(network: nn.Module, update: int, draws: Draws) -> Tensor:
            batch = self.batch(update, effort.batch_size)
            return output_matching_loss(network, self.teacher, self.schedule, batch, W_RANGE, draws)

        return self._train(network, loss, effort.optimisation(effort.stage1), "stage1")

    def halvings(
        self, stage1: VectorDenoiser, effort: Effort, last: int = 1, course: Course = "deterministic"
    ) -> dict[int, VectorDenoiser]:
        """Stage 2: the students of START / 2, START / 4, ... and `last` steps."""
        students, student, steps = {}, stage1, START
        while steps > last:
            steps //= 2
            students[steps] = student = self.halve(student, steps, effort, course)
        return students

    def halve(
        self, teacher: VectorDenoiser, steps: int, effort: Effort, course: Course = "deterministic", replaced: int = 2
    ) -> VectorDenoiser:
        """One round of stage 2, each of whose steps replaces two of the teacher's, or as many as are given."""
        network = VectorDenoiser(self.dimensions, self.mixture.classes)
        network.load_state_dict(teacher.state_dict())

        def loss(network: nn.Module, update: int, draws: Draws) -> Tensor:
            batch = self.batch(update, effort.batch_size)
            return progressive_loss(
                network, teacher, self.schedule, batch, steps, W_RANGE, draws, course=course, replaced=replaced
            )

        return self._train(network, loss, effort.optimisation(effort.updates(steps), 0.5), f"{course}-{steps}")

    def _train(
        self, network: VectorDenoiser, loss: Callable[[nn.Module, int, Draws], Tensor], recipe: Optimisation,
        stage: str,
    ) -> VectorDenoiser:  # fmt: skip
        trained = train(network, loss, recipe, self.folder / stage, accelerator=Accelerator(cpu=True), seed=1)
        return trained.requires_grad_(False)

    @torch.inference_mode()
    def output_error(self, student: Denoiser) -> float:
        """The relative L2 error of a student's x against the exact guided x, over w and t drawn as in training."""
        rows = 8 * TEST_ROWS
        batch, draws = self.batch(TEST_PLACE, rows), Draws(2, 0, range(rows))
        t = draw_any_times(self.schedule, draws).to(batch.x)
        w = draw_guidance(W_RANGE, draws).to(batch.x)
        alpha, sigma = self.schedule.at(t, batch.x)
        z = diffuse(batch.x, draws.normal(batch.x), alpha, sigma)
        x, exact = (x_from_v(z, d(z, t, batch.condition, w), alpha, sigma) for d in (student, self.teacher))
        return distance(x, exact)

    def map_errors(self, students: Mapping[int, Denoiser]) -> dict[int, tuple[float, float]]:
        """For each number of steps, the errors of the student and of guided DDIM against the exact ODE map."""
        noise, condition, w, exact = self.exact_map()

        def error(denoiser: Denoiser, steps: int) -> float:
            return distance(sample(denoiser, self.schedule.grid(steps), noise, condition, w), exact)

        return {steps: (error(student, steps), error(self.teacher, steps)) for steps, student in students.items()}

    def encoding_errors(self, encoders: Mapping[int, Denoiser]) -> dict[int, tuple[float, float]]:
        """The same the other way: the errors of encoders, and of guided DDIM in reverse, against the exact noise."""
        noise, condition, w, exact = self.exact_map()

        def error(denoiser: Denoiser, steps: int) -> float:
            return distance(encode(denoiser, self.schedule.grid(steps), exact, condition, w), noise)

        return {steps: (error(encoder, steps), error(self.teacher, steps)) for steps, encoder in encoders.items()}

    @cache  # noqa: B019 - a problem lives as long as its figures are asked for
    def exact_map(self) -> tuple[Tensor, Condition, Tensor, Tensor]:
        """Noise (N, D), condition, w (N,), and the clean data (N, D) to which the guided ODE carries them."""
        noise = torch.randn(TEST_ROWS, self.dimensions, generator=generator_at(3, 0))
        label = torch.arange(TEST_ROWS) % self.mixture.classes
        w = torch.linspace(*W_RANGE, TEST_ROWS)
        start = (float(self.schedule.alphas[-1]), float(self.schedule.sigmas[-1]))
        return noise, {"label": label}, w, solve_guided_ode(self.mixture, noise, label, w, start).float()


def distance(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((a - b).norm() / b.norm())


@click.command()
@click.option("--dimensions", type=click.IntRange(min=2), default=2, show_default=True)
@click.option("--long", is_flag=True, help="Train several times longer.")
def main(dimensions: int, long: bool) -> None:
    """Print the errors of both stages against exact answers."""
    effort = LONG if long else SHORT
    with TemporaryDirectory() as folder:
        problem = Problem(dimensions, Path(folder))
        student = problem.match_outputs(effort)
        click.echo(f"stage 1, relative L2 error of x: {problem.output_error(student):.4f}")
        students = problem.halvings(student, effort)
        click.echo("| steps | student | guided DDIM | DDIM / student |\n|--:|--:|--:|--:|")
        for steps, (ours, theirs) in problem.map_errors(students).items():
            click.echo(f"| {steps} | {ours:.4f} | {theirs:.4f} | {theirs / ours:.1f} |")
        encoders = problem.halvings(student, effort, LAST_ENCODER, "encoding")
        click.echo("\n| steps | encoder | guided DDIM in reverse | DDIM / encoder |\n|--:|--:|--:|--:|")
        for steps, (ours, theirs) in problem.encoding_errors(encoders).items():
            click.echo(f"| {steps} | {ours:.4f} | {theirs:.4f} | {theirs / ours:.1f} |")


if __name__ == "__main__":
    main()
