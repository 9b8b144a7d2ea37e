"""The quality table as two plots of the Frechet distance: over network calls, and over guidance. Measures nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

from training.evaluation.quality import Quality, Row
from training.evaluation.tables import counts
from training.solvers import SOLVER_NAMES
from training.store import whole_file

INK, GREY, GRID = "#222222", "#767676", "#e3e3e3"
WIDTH, HEIGHT, FOOT = 3.1, 3.6, 0.8  # of a panel, and of the note below the panels, in inches
FLOOR = "real images (floor)"


@dataclass(frozen=True)
class _Style:
    """How a family of candidates is drawn: what is drawn later is thinner, so that equal lines can all be seen."""

    colour: str
    marker: str
    width: float


# The colours are of Okabe and Ito's palette, which colour-blind readers tell apart.
STYLES: Mapping[str, _Style] = {
    "Students, stochastic": _Style("#e69f00", "v", 2.0),
    "Teacher, DDIM": _Style("#0072b2", "s", 2.6),
    "Teacher, DPM-Solver++ (2M)": _Style("#009e73", "^", 1.8),
    "Teacher, UniPC": _Style("#cc79a7", "D", 1.1),
    "Students": _Style("#d55e00", "o", 1.8),
}


def save_plots(quality: Quality, folder: Path) -> None:
    """Write quality-calls.png and quality-guidance.png into a folder."""
    for name, plot in (("quality-calls.png", plot_calls), ("quality-guidance.png", plot_guidance)):
        with whole_file(folder / name) as partial:
            plot(quality).savefig(partial, format="png", dpi=150, facecolor="white")


def plot_calls(quality: Quality) -> Figure:
    """The Frechet distance over network calls: a panel for each w, a line for each family."""
    figure, panels = _panels(len(quality.guidance), quality)
    for k, (panel, w) in enumerate(zip(panels, quality.guidance, strict=True)):
        for family, rows in _families(quality):
            rows = sorted(rows, key=lambda row: row.network_calls)
            calls = [row.network_calls for row in rows]
            _line(panel, calls, [row.cells[k].figures.frechet for row in rows], STYLES[family], family)
        panel.set_title(f"w = {w:g}")
        panel.set_xscale("log")
        panel.set_xticks(sorted({row.network_calls for row in quality.rows}))
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xlabel("network calls per image")
    _legend(figure, panels[0])
    return figure


def plot_guidance(quality: Quality) -> Figure:
    """The Frechet distance over w: a panel for each family, a line for each of its step counts.

    The candidate that the others are compared with is in every panel.
    """
    families = list(_families(quality))
    figure, panels = _panels(len(families), quality)
    first = quality.rows[0]
    for panel, (family, rows) in zip(panels, families, strict=True):
        style = STYLES[family]
        if first not in rows:
            label = f"teacher, DDIM, {_steps(first)}"
            _line(panel, quality.guidance, _distances(first), _Style(GREY, "", 1.6), label)
        lines = [
            _line(panel, quality.guidance, _distances(row), style, _steps(row), lighter=k / len(rows))
            for k, row in enumerate(rows)
        ]
        panel.legend(handles=lines, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=3, fontsize=8, frameon=False)
        panel.set_title(family)
        panel.set_xticks(quality.guidance, [f"{w:g}" for w in quality.guidance])
        panel.set_xlabel("guidance weight w")
    _legend(figure, panels[-1], (f"teacher, DDIM, {_steps(first)}", FLOOR))
    return figure


def _panels(columns: int, quality: Quality) -> tuple[Figure, list[Axes]]:
    """Panels side by side with a common axis of distances, the floor in each, and a note of what is compared."""
    inches = max(2, columns) * WIDTH
    figure = Figure(figsize=(inches, HEIGHT + FOOT), layout="constrained")
    panels: list[Axes] = figure.subplots(1, columns, sharey=True, squeeze=False)[0].tolist()
    for panel in panels:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(ScalarFormatter())
        panel.yaxis.set_minor_locator(NullLocator())
        panel.grid(color=GRID, linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color(GREY)
        panel.tick_params(color=GREY, labelcolor=INK, labelsize=8)
        panel.axhline(quality.floor.frechet, color=INK, linestyle="--", linewidth=1, label=FLOOR)
    panels[0].set_ylabel("Frechet distance (squared), lower is better", fontsize=9)
    about = quality.provenance
    note = f"{about.recipe}: {counts(about)}; features: {about.extractor}, {about.frechet_dims} principal components."
    figure.supxlabel(fill(note, int(12 * inches)), fontsize=8, color=GREY)
    return figure, panels


def _line(panel: Axes, x: Sequence[float], y: Sequence[float], style: _Style, label: str, lighter: float = 0) -> Line2D:
    """Draw a line; `lighter` is the share of white that its colour is mixed with, of which at most 70 % are taken."""
    colour = tuple(value + (1 - value) * 0.7 * lighter for value in to_rgb(style.colour))
    [line] = panel.plot(
        x, y, label=label, color=colour, marker=style.marker, markersize=3.5 + 1.5 * style.width, linewidth=style.width
    )
    return line


def _legend(figure: Figure, panel: Axes, only: Sequence[str] = ()) -> None:
    """The legend above all panels, of one panel's lines or of some of them."""
    handles, labels = panel.get_legend_handles_labels()
    shown = {label: handle for handle, label in zip(handles, labels, strict=True) if not only or label in only}
    names = [name for name in shown if name != FLOOR] + [FLOOR]
    columns = max(2, int(figure.get_figwidth() / 2.2))
    handles = [shown[name] for name in names]
    figure.legend(handles, names, loc="outside upper center", ncols=columns, fontsize=9, frameon=False)


def _families(quality: Quality) -> Iterator[tuple[str, list[Row]]]:
    for family in STYLES:
        if rows := [row for row in quality.rows if _family(row) == family]:
            yield family, rows


def _family(row: Row) -> str:
    if row.model == "teacher":
        return f"Teacher, {SOLVER_NAMES[row.sampler]}"
    return "Students" if row.sampler == "ddim" else "Students, stochastic"


def _distances(row: Row) -> list[float]:
    return [cell.figures.frechet for cell in row.cells]


def _steps(row: Row) -> str:
    return f"{row.steps} step{'s' if row.steps > 1 else ''}"
