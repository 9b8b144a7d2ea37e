"""The quality table as data. Knows no networks and measures nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Figures:
    """What was measured of a set of images; FID, Inception Score and CLIP score are None where not asked for.

    KID and Inception Score have their standard deviation over subsets and splits. Precision and recall are of
    `manifold_images` generated and as many real images.
    """

    kid: float
    kid_deviation: float
    kid_subset_images: int
    frechet: float
    precision: float
    recall: float
    manifold_images: int
    fid: float | None = None
    inception_score: float | None = None
    inception_score_deviation: float | None = None
    clip_score: float | None = None


@dataclass(frozen=True)
class Cell:
    """The figures of one candidate at one w; `rmse` is to the images of the table's first candidate at equal noise."""

    w: float
    figures: Figures
    rmse: float | None


@dataclass(frozen=True)
class Row:
    """A candidate: its cells, one for each w, and what an image costs."""

    model: str
    sampler: str
    steps: int
    network_calls: int
    seconds_per_image: float
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Provenance:
    """What the figures depend on, to be printed with them.

    `images` is the count of generated images in every cell, `floor_images` that of the real ones of the floor.
    """

    recipe: str
    split: str
    data: str
    images: int
    floor_images: int
    reference_images: int
    extractor: str
    inception: str | None
    clip: str | None
    kid_subsets: int
    frechet_dims: int
    neighbours: int
    seed: int
    precision: str
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
    """The whole table. `floor` has the figures of the real images of the same conditions, as many as there are."""

    rows: tuple[Row, ...]
    floor: Figures
    provenance: Provenance
    timing: Timing

    @property
    def guidance(self) -> tuple[float, ...]:
        """The values of w, one for each column."""
        return tuple(cell.w for cell in self.rows[0].cells)
