"""The quality table as data, and as Markdown, CSV and JSON. Knows no networks and measures nothing."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass

from training.metrics import psnr_db


@dataclass(frozen=True)
class Distances:
    """How far a set of images is from the reference: KID with its deviation over subsets, and the Frechet distance."""

    kid: float
    kid_deviation: float
    kid_subset_images: int
    frechet: float


@dataclass(frozen=True)
class Cell:
    """The figures of one candidate at one w; `rmse` is to the images of the table's first candidate at equal noise."""

    w: float
    distances: Distances
    rmse: float | None


@dataclass(frozen=True)
class Row:
    """A candidate: its cells, one for each w, and what an image costs."""

    model: str
    steps: int
    network_calls: int
    seconds_per_image: float
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Provenance:
    """What the figures depend on, to be printed with them."""

    recipe: str
    data: str
    images: int
    reference_images: int
    extractor: str
    kid_subsets: int
    frechet_dims: int
    seed: int
    weights: Mapping[str, str]


@dataclass(frozen=True)
class Timing:
    """Under which circumstances the seconds were measured: all rows in turns, in one process."""

    device: str
    threads: int
    images: int
    rounds: int


@dataclass(frozen=True)
class Quality:
    """The whole table. `floor` has the distances of real images, as many as the generated ones."""

    rows: tuple[Row, ...]
    floor: Distances
    provenance: Provenance
    timing: Timing

    @property
    def guidance(self) -> tuple[float, ...]:
        """The values of w, one for each column."""
        return tuple(cell.w for cell in self.rows[0].cells)


def to_markdown(quality: Quality) -> str:
    """Three tables, KID, Frechet distance and PSNR, over w, below a paragraph that says what was compared."""
    about, floor, first = quality.provenance, quality.floor, quality.rows[0]
    kid = _table(quality, lambda cell: _kid(cell.distances), _kid(floor))
    frechet = _table(quality, lambda cell: f"{cell.distances.frechet:.2f}", f"{floor.frechet:.2f}")
    psnr = _table(quality, lambda cell: "" if cell.rmse is None else f"{psnr_db(cell.rmse):.1f}", None)
    return "\n\n".join(
        [
            f"Split: {about.data}. Every cell: {about.images} generated images, one for each caption or class, against "
            f"{about.reference_images} real images. Floor: the {about.images} real images of the same captions or "
            f"classes against the same reference. Features: {about.extractor}. w is the guidance scale less one. "
            f"The noise of an image is the same in all rows and columns (seed {about.seed}). Seconds an image on "
            f"{_place(quality.timing)}: the median of {quality.timing.rounds} rounds of {quality.timing.images} images "
            "with all rows in turns, text encoding left out.",
            f"**KID x 1000**, mean ± standard deviation over {about.kid_subsets} subsets of {floor.kid_subset_images} "
            "images; lower is better.",
            kid,
            f"**Frechet distance** (squared) on these features, projected to the reference's first "
            f"{about.frechet_dims} principal components: not an FID; lower is better.",
            frechet,
            f"**PSNR in dB** against the {first.model} at {first.steps} steps from equal noise, with equal condition "
            "and w; higher is nearer.",
            psnr,
        ]
    ) + "\n"  # fmt: skip


def to_csv(quality: Quality) -> str:
    """One line for each candidate and w; the floor, which has no w, as the last."""
    counts = {"images": quality.provenance.images, "reference_images": quality.provenance.reference_images}
    lines = [_cost(row) | {"w": cell.w} | _figures(cell) | counts for row in quality.rows for cell in row.cells]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    writer.writerow({"model": "real images"} | asdict(quality.floor) | counts)
    return out.getvalue()


def to_json(quality: Quality) -> str:
    """All figures and all that they depend on; the seconds are the only ones that a machine has a part in."""
    return json.dumps(asdict(quality), indent=1) + "\n"


def _cost(row: Row) -> dict[str, str | float]:
    return {name: value for name, value in vars(row).items() if name != "cells"}


def _figures(cell: Cell) -> dict[str, float | None]:
    psnr = None if cell.rmse is None else psnr_db(cell.rmse)
    return asdict(cell.distances) | {"rmse": cell.rmse, "psnr_db": psnr}


def _table(quality: Quality, figure: Callable[[Cell], str], floor: str | None) -> str:
    head = ["model", "steps", "network calls", "s/image", *(f"w = {w:g}" for w in quality.guidance)]
    lines = [_line(head), _line(["---", *["--:"] * (len(head) - 1)])]
    for row in quality.rows:
        cost = [row.model, str(row.steps), str(row.network_calls), f"{row.seconds_per_image:.3g}"]
        lines.append(_line([*cost, *map(figure, row.cells)]))
    if floor is not None:
        lines.append(_line(["real images (floor)", "", "", "", *[floor] * len(quality.guidance)]))
    return "\n".join(lines)


def _line(fields: Iterable[str]) -> str:
    return f"| {' | '.join(fields)} |"


def _kid(distances: Distances) -> str:
    return f"{1000 * distances.kid:.1f} ± {1000 * distances.kid_deviation:.1f}"


def _place(timing: Timing) -> str:
    if timing.device != "cpu":
        return f"one {timing.device}"
    return f"{timing.threads} CPU thread{'s' if timing.threads > 1 else ''}"
