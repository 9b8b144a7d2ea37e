"""The plots: which lines are in which panel, at which values, and that files can be written."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from training.evaluation.plots import plot_calls, plot_guidance, save_plots
from training.evaluation.quality import Cell, Figures, Provenance, Quality, Row, Timing
from training.solvers import Solver

ABOUT = Provenance("tiny", "train", "", 5000, 808, 809, "pixels at 8 px", None, None, 100, 16, 5, 0, "fp32", {})
GUIDANCE = (0.0, 1.0, 4.0)


def figures(frechet: float) -> Figures:
    return Figures(0.1, 0.01, 400, frechet, 0.7, 0.6, 809)


def row(
    model: str, steps: int, frechet: float, sampler: Solver = "ddim", guidance: tuple[float, ...] = GUIDANCE
) -> Row:
    calls = steps if model == "student" else 2 * steps
    return Row(model, sampler, steps, calls, 0.1, tuple(Cell(w, figures(frechet * (1 + w)), 0.1) for w in guidance))


def table(*rows: Row) -> Quality:
    return Quality(rows, figures(2.0), ABOUT, Timing("cpu", 1, 16, 3))


WHOLE = table(
    row("teacher", 50, 10), row("teacher", 4, 20), row("teacher", 1, 90), row("teacher", 4, 18, "dpm-solver++"),
    row("teacher", 4, 17, "unipc"), row("student", 4, 11), row("student", 1, 14),
)  # fmt: skip


def lines(panel: Axes) -> dict[str, tuple[list[float], list[float]]]:
    return {
        str(line.get_label()): (np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist())
        for line in panel.get_lines()
    }


def test_every_w_has_a_panel_of_distance_over_calls_with_a_line_for_each_family_and_the_floor() -> None:
    panels = plot_calls(WHOLE).axes
    assert [panel.get_title() for panel in panels] == ["w = 0", "w = 1", "w = 4"]
    assert lines(panels[1]) == {
        "Teacher, DDIM": ([2, 8, 100], [180, 40, 20]),
        "Teacher, DPM-Solver++ (2M)": ([8], [36]),
        "Teacher, UniPC": ([8], [34]),
        "Students": ([1, 4], [28, 22]),
        "real images (floor)": ([0, 1], [2, 2]),
    }
    assert all(panel.get_xscale() == "log" for panel in panels)
    assert all("network calls" in panel.get_xlabel() for panel in panels)


def test_every_family_has_a_panel_of_distance_over_w_beside_the_teacher_with_most_steps() -> None:
    panels = {panel.get_title(): lines(panel) for panel in plot_guidance(WHOLE).axes}
    assert list(panels) == ["Teacher, DDIM", "Teacher, DPM-Solver++ (2M)", "Teacher, UniPC", "Students"]
    students = panels["Students"]
    assert students["4 steps"] == ([0, 1, 4], [11, 22, 55])
    assert students["1 step"] == ([0, 1, 4], [14, 28, 70])
    assert students["teacher, DDIM, 50 steps"] == ([0, 1, 4], [10, 20, 50])
    assert set(panels["Teacher, DDIM"]) == {"50 steps", "4 steps", "1 step", "real images (floor)"}


def test_a_note_tells_counts_split_and_extractor() -> None:
    for plot in (plot_calls, plot_guidance):
        note = " ".join(plot(WHOLE).get_supxlabel().split())
        for part in ("5000 generated images", "809 in the reference", "808 in the floor", "split: train", "pixels"):
            assert part in note


@pytest.mark.parametrize(
    "quality",
    [WHOLE, table(row("teacher", 4, 10, guidance=(1.0,))), table(row("teacher", 4, 10), row("student", 4, 12))],
    ids=["whole", "one cell", "two rows"],
)
def test_both_plots_are_written_whatever_was_measured(
    quality: Quality, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("plots")
    save_plots(quality, folder)
    assert {path.name for path in folder.iterdir()} == {"quality-calls.png", "quality-guidance.png"}
    for path in folder.iterdir():
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").getcolors(maxcolors=1 << 20) or []) > 10
