"""The quality table as Markdown, CSV and JSON. Measures nothing."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict

from engines.decibels import psnr_db
from training.evaluation.quality import Cell, Figures, Provenance, Quality, Row, Timing
from training.solvers import SOLVER_NAMES

# What published figures are made of at the least; below it only rows of one table can be compared.
SOUND_IMAGES = 5000


def to_markdown(quality: Quality) -> str:
    """A table over w of each figure that was measured, below a paragraph that says what was compared."""
    about, first = quality.provenance, quality.rows[0]
    parts = [_introduction(quality)]
    for title, figure in _tables(quality):
        cells = [[figure(cell.figures) for cell in row.cells] for row in quality.rows]
        parts += [title, _table(quality, cells, figure(quality.floor))]
    psnr = [["" if c.rmse is None else f"{psnr_db(c.rmse**2):.1f}" for c in row.cells] for row in quality.rows]
    parts += [
        f"**PSNR in dB** against the {first.model} ({_sampler(first)}) at {first.steps} steps from equal noise, with "
        f"equal condition and w; higher is nearer. {_count(about.images, 'pair')} of images a cell; split: "
        f"{about.split}; no features, the pixels themselves.",
        _table(quality, psnr, None),
    ]
    return "\n\n".join(parts) + "\n"


def to_csv(quality: Quality) -> str:
    """One line for each candidate and w; the floor, which has no w, as the last."""
    about = quality.provenance
    names = ("reference_images", "split", "extractor", "frechet_dims", "kid_subsets", "neighbours", "inception", "clip")
    shared = {name: getattr(about, name) for name in names}
    lines = [
        _cost(row) | {"w": cell.w} | _figures(cell) | {"images": about.images} | shared
        for row in quality.rows
        for cell in row.cells
    ]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    writer.writerow({"model": "real images"} | asdict(quality.floor) | {"images": about.floor_images} | shared)
    return out.getvalue()


def to_json(quality: Quality) -> str:
    """All figures and all that they depend on; the seconds are the only ones that a machine has a part in."""
    return json.dumps(asdict(quality), indent=1) + "\n"


def counts(about: Provenance) -> str:
    """How many images of which split a figure is made of."""
    return (
        f"{_count(about.images, 'generated image')} a cell, {about.reference_images} in the reference, "
        f"{about.floor_images} in the floor; split: {about.split}"
    )


def _introduction(quality: Quality) -> str:
    about, timing = quality.provenance, quality.timing
    again = "" if about.images == about.floor_images else ", which are used again in a new random order"
    few = (
        ""
        if about.images >= SOUND_IMAGES
        else f" These are fewer than the {SOUND_IMAGES} that sound figures need: compare the rows of this table only."
    )
    return (
        f"Split: {about.data}. Every cell: {_count(about.images, 'generated image')}, one for each caption or class of "
        f"{_count(about.floor_images, 'real image')}{again}, against {about.reference_images} other real images.{few} "
        f"Floor: these {about.floor_images} real images against the same reference. w is the guidance scale less one. "
        "The noise that an image begins with is the same in all rows and columns "
        f"(seed {about.seed}), the networks compute in {about.precision}. Seconds an image on {_place(timing)}: the "
        f"median of {timing.rounds} rounds of {timing.images} images with all rows in turns, "
        "text encoding left out."
    )


def _tables(quality: Quality) -> Iterator[tuple[str, Callable[[Figures], str]]]:
    """The title of each table over w, and how it shows its figure."""
    about, floor, cell = quality.provenance, quality.floor, quality.rows[0].cells[0].figures
    here = f"{counts(about)}; features: {about.extractor}."
    yield (
        f"**KID x 1000**, mean ± standard deviation over {about.kid_subsets} subsets of {cell.kid_subset_images} "
        f"images (floor: {floor.kid_subset_images}); lower is better. {here}",
        lambda f: f"{1000 * f.kid:.1f} ± {1000 * f.kid_deviation:.1f}",
    )
    space = f"projected to the reference's first {about.frechet_dims} principal components"
    yield (
        f"**Frechet distance** (squared) on these features, {space}: not an FID; lower is better.{_bias(about)} {here}",
        lambda f: f"{f.frechet:.2f}",
    )
    yield (
        f"**Precision / recall** with {about.neighbours} neighbours, on these features, {space}; higher is better. "
        f"{cell.manifold_images} generated and as many real images (floor: {floor.manifold_images} of each). {here}",
        lambda f: f"{f.precision:.3f} / {f.recall:.3f}",
    )
    if about.inception is not None:
        there = f"{counts(about)}; features: {about.inception}."
        yield (
            "**FID**, biased upwards by small sets: to be compared at equal counts only; lower is better."
            f"{_bias(about)} {there}",
            lambda f: f"{f.fid:.2f}",
        )
        yield (
            f"**Inception Score**, mean ± standard deviation over 10 splits; higher is better. {there}",
            lambda f: f"{f.inception_score:.2f} ± {f.inception_score_deviation:.2f}",
        )
    if about.clip is not None:
        yield (
            "**CLIP score**, the mean of 100 max(cosine of image and prompt, 0); higher is better. The floor has the "
            f"real images with their own captions. {counts(about)}; features: {about.clip}.",
            lambda f: f"{f.clip_score:.2f}",
        )


def _bias(about: Provenance) -> str:
    """What a Frechet distance of fewer images than the cells' needs said of it."""
    if about.floor_images >= about.images:
        return ""
    return " The fewer the images, the more it is biased upwards: that of the floor more than those of the cells."


def _cost(row: Row) -> dict[str, str | float]:
    return {name: value for name, value in vars(row).items() if name != "cells"}


def _figures(cell: Cell) -> dict[str, float | None]:
    psnr = None if cell.rmse is None else psnr_db(cell.rmse**2)
    return asdict(cell.figures) | {"rmse": cell.rmse, "psnr_db": psnr}


def _table(quality: Quality, cells: list[list[str]], floor: str | None) -> str:
    head = ["model", "sampler", "steps", "network calls", "s/image", *(f"w = {w:g}" for w in quality.guidance)]
    lines = [_line(head), _line(["---", "---", *["--:"] * (len(head) - 2)])]
    for row, figures in zip(quality.rows, cells, strict=True):
        cost = [row.model, _sampler(row), str(row.steps), str(row.network_calls), f"{row.seconds_per_image:.3g}"]
        lines.append(_line([*cost, *figures]))
    if floor is not None:
        lines.append(_line(["real images (floor)", "", "", "", "", *[floor] * len(quality.guidance)]))
    return "\n".join(lines)


def _sampler(row: Row) -> str:
    return "its own steps" if row.model == "student" and row.sampler == "ddim" else SOLVER_NAMES[row.sampler]


def _line(fields: Iterable[str]) -> str:
    return f"| {' | '.join(fields)} |"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _place(timing: Timing) -> str:
    if timing.device != "cpu":
        return f"one {timing.device}"
    return _count(timing.threads, "CPU thread")
