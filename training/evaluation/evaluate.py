"""The quality table of a run: its teacher and its students, in several steps and with several w, against real images.

Images and figures are kept in the run's folder under a hash of what they depend on, so that an evaluation that was
stopped goes on where it was, and one that is repeated is only printed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from tqdm import tqdm

from training.data.training_set import to_tensor
from training.evaluation.candidates import Candidate, ImageMaker, arithmetic
from training.evaluation.clip_score import ClipScorer
from training.evaluation.features import FeatureExtractor
from training.evaluation.inception import Inception
from training.evaluation.judge import KID_SUBSETS, NEIGHBOURS, Judge
from training.evaluation.metrics import root_mean_square_error
from training.evaluation.quality import Cell, Provenance, Quality, Row, Timing
from training.pictures import save_grid
from training.run import Run
from training.stages import AUTOENCODER

# To be raised when a change of the code changes how long the same images take.
TIMINGS_VERSION = 1
TIMED_IMAGES, TIMED_ROUNDS = 16, 3
PICTURE_COLUMNS = 10


@dataclass(frozen=True)
class Plan:
    """What is compared. The images of all candidates are compared with those of the first one, from equal noise."""

    candidates: tuple[Candidate, ...]
    guidance: tuple[float, ...]
    frechet_dims: int = 64

    @property
    def places(self) -> list[tuple[float, Candidate]]:
        """Every w with every candidate."""
        return [(w, candidate) for w in self.guidance for candidate in self.candidates]


def evaluate(
    maker: ImageMaker,
    extractor: FeatureExtractor,
    plan: Plan,
    inception: Inception | None = None,
    clip: ClipScorer | None = None,
) -> Quality:
    """Make the images that are missing, compare them with real ones, and time the candidates.

    FID and Inception Score are measured with `inception`, the CLIP score with `clip`. Raises MetricError if there
    are too few images for the figures, before any is made.
    """
    data = maker.data
    judge = Judge(data, extractor, plan.frechet_dims, maker.seed, maker.store, inception, clip, maker.run.device)
    floor = judge(data.images)
    make_images(maker, plan)
    cells = {(w, candidate): cell for w, candidate, cell in _compare(maker, judge, plan)}
    timing, seconds = time_candidates(maker, plan)
    rows = tuple(
        Row(c.model, c.sampler, c.steps, c.calls, seconds[k], tuple(cells[w, c] for w in plan.guidance))
        for k, c in enumerate(plan.candidates)
    )
    autoencoder = [AUTOENCODER] if maker.run.is_latent else []
    provenance = Provenance(
        recipe=maker.run.recipe.name,
        split=data.split,
        data=data.description,
        images=len(data),
        floor_images=len(data.images),
        reference_images=len(data.reference),
        extractor=extractor.identity,
        inception=None if inception is None else inception.identity,
        clip=None if clip is None else clip.identity,
        kid_subsets=KID_SUBSETS,
        frechet_dims=plan.frechet_dims,
        neighbours=NEIGHBOURS,
        seed=maker.seed,
        precision=arithmetic(maker.run),
        weights={stage: maker.weights(stage) for stage in [*(c.stage for c in plan.candidates), *autoencoder]},
    )
    return Quality(rows, floor, provenance, timing)


def make_images(maker: ImageMaker, plan: Plan) -> None:
    """Make the images that are missing, under one progress bar: a call of a network on n images counts as n."""
    total = sum(maker.missing_calls(candidate, w) for w, candidate in plan.places)
    with tqdm(total=total, unit="call", unit_scale=True, disable=not total, dynamic_ncols=True) as bar:
        for w, candidate in plan.places:
            bar.set_description(f"{candidate.name}, w = {w:g}")
            maker.images(candidate, w, bar.update)


def _compare(maker: ImageMaker, judge: Judge, plan: Plan) -> Iterator[tuple[float, Candidate, Cell]]:
    first = None
    for w, candidate in tqdm(plan.places, desc="comparing", unit="cell", disable=None):
        images = maker.images(candidate, w)
        if candidate == plan.candidates[0]:
            first = images
            yield w, candidate, Cell(w, judge(images), None)
        else:
            assert first is not None
            yield w, candidate, Cell(w, judge(images), root_mean_square_error(images, first))


def time_candidates(maker: ImageMaker, plan: Plan) -> tuple[Timing, list[float]]:
    """Seconds an image of each candidate: a batch of each in turns, the median of some rounds. They are kept."""
    rows = range(min(TIMED_IMAGES, len(maker.data)))
    timing = Timing(_device_name(maker.run), torch.get_num_threads(), len(rows), TIMED_ROUNDS)
    weights = [[maker.weights(c.stage), c.sampler, c.steps] for c in plan.candidates]

    def measure() -> dict[str, list[float]]:
        taken: list[list[float]] = [[] for _ in plan.candidates]
        turns = list(enumerate(plan.candidates)) * TIMED_ROUNDS
        for k, candidate in tqdm(turns, desc="timing", unit="batch", disable=None):
            start = time.perf_counter()
            maker.make(candidate, plan.guidance[-1], rows)
            taken[k].append((time.perf_counter() - start) / len(rows))
        return {"seconds_per_image": [median(values) for values in taken]}

    scale = maker.run.recipe.scale
    how = {"compile": scale.compile, "capture": scale.capture, "precision": maker.run.recipe.precision}
    inputs = {"version": TIMINGS_VERSION, "weights": weights, **asdict(timing), **how}
    kept = maker.store.figures("timings", inputs, measure)
    return timing, kept["seconds_per_image"]


def save_picture(maker: ImageMaker, plan: Plan, w: float, path: Path) -> str:
    """Write a picture, a column for each of the first conditions, a row for real images and each candidate at w.

    Returns its legend.
    """
    columns = min(PICTURE_COLUMNS, len(maker.data.images))
    made = (maker.images(candidate, w)[:columns].copy() for candidate in plan.candidates)
    save_grid(to_tensor(np.concatenate([maker.data.images[:columns], *made])), path, columns)
    names = ["real images", *(c.name for c in plan.candidates)]
    return (
        f"{path.name}, w = {w:g}. Rows from the top: {'; '.join(names)}. "
        f"Columns from the left: {'; '.join(maker.data.words[:columns])}."
    )


def _device_name(run: Run) -> str:
    device = run.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
