"""The reports of a table: every figure with its counts, and tables only of what was measured."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

from training.evaluation.quality import Cell, Figures, Provenance, Quality, Row, Timing
from training.evaluation.tables import to_csv, to_json, to_markdown

FIGURES = Figures(0.5, 0.01, 400, 12.3, 0.71, 0.62, 809)
FLOOR = Figures(-0.01, 0.02, 90, 1.5, 0.9, 0.8, 180)
ABOUT = Provenance(
    recipe="tiny",
    split="heldout",
    data="heldout gives the classes",
    images=5000,
    floor_images=180,
    reference_images=809,
    extractor="pixels at 8 px",
    inception=None,
    clip=None,
    kid_subsets=100,
    frechet_dims=16,
    neighbours=5,
    seed=0,
    precision="fp32",
    weights={},
)


def table(figures: Figures = FIGURES, floor: Figures = FLOOR, about: Provenance = ABOUT) -> Quality:
    rows = (
        Row("teacher", "ddim", 50, 100, 0.1, (Cell(0.0, figures, None), Cell(2.0, figures, None))),
        Row("student", "ddim", 1, 1, 0.01, (Cell(0.0, figures, 0.1), Cell(2.0, figures, 0.01))),
    )
    return Quality(rows, floor, about, Timing("cpu", 1, 16, 3))


def measured_with_all() -> Quality:
    def more(figures: Figures) -> Figures:
        return replace(figures, fid=21.5, inception_score=3.25, inception_score_deviation=0.125, clip_score=28.75)

    about = replace(ABOUT, inception="Inception 6726825d", clip="CLIP of tiny")
    return table(more(FIGURES), more(FLOOR), about)


def sections(quality: Quality) -> dict[str, str]:
    """Each table below its title's first words."""
    parts = to_markdown(quality).strip().split("\n\n")[1:]
    return {title.split("**")[1]: f"{title}\n{body}" for title, body in zip(parts[::2], parts[1::2], strict=True)}


def test_only_what_was_measured_has_a_table() -> None:
    always = ["KID x 1000", "Frechet distance", "Precision / recall"]
    assert list(sections(table())) == [*always, "PSNR in dB"]
    assert list(sections(measured_with_all())) == [*always, "FID", "Inception Score", "CLIP score", "PSNR in dB"]


def test_every_table_names_counts_split_and_extractor() -> None:
    tables = sections(measured_with_all())
    features = {"FID": "Inception 6726825d", "Inception Score": "Inception 6726825d", "CLIP score": "CLIP of tiny"}
    for name, text in tables.items():
        assert "5000" in text
        assert "split: heldout" in text
        if name != "PSNR in dB":
            assert "809 in the reference, 180 in the floor" in text
            assert features.get(name, "pixels at 8 px") in text


def test_every_row_shows_its_figure_and_the_floor_its_own() -> None:
    tables = sections(measured_with_all())
    for name, figure, floor in [
        ("KID x 1000", "500.0 ± 10.0", "-10.0 ± 20.0"), ("Frechet distance", "12.30", "1.50"),
        ("Precision / recall", "0.710 / 0.620", "0.900 / 0.800"), ("FID", "21.50", "21.50"),
        ("Inception Score", "3.25 ± 0.12", "3.25 ± 0.12"), ("CLIP score", "28.75", "28.75"),
    ]:  # fmt: skip
        *_, teacher, student, real = tables[name].splitlines()
        assert teacher == f"| teacher | DDIM | 50 | 100 | 0.1 | {figure} | {figure} |"
        assert student == f"| student | its own steps | 1 | 1 | 0.01 | {figure} | {figure} |"
        assert real == f"| real images (floor) |  |  |  |  | {floor} | {floor} |"
    assert tables["PSNR in dB"].splitlines()[-1] == "| student | its own steps | 1 | 1 | 0.01 | 20.0 | 40.0 |"


def test_too_few_images_for_sound_figures_are_owned_up_to() -> None:
    assert "fewer than the 5000" not in to_markdown(table())
    assert "fewer than the 5000" in to_markdown(table(about=replace(ABOUT, images=4999)))


def test_a_floor_of_fewer_images_than_the_cells_is_said_to_be_biased_more() -> None:
    said = "that of the floor more than those of the cells"
    assert to_markdown(table()).count(said) == 1
    assert to_markdown(measured_with_all()).count(said) == 2
    assert said not in to_markdown(table(about=replace(ABOUT, images=180)))


def test_conditions_that_are_used_again_are_told_of() -> None:
    assert "used again" in to_markdown(table())
    assert "used again" not in to_markdown(table(about=replace(ABOUT, images=180)))


def test_csv_has_a_column_of_every_figure_and_the_counts_of_every_line() -> None:
    lines = list(csv.DictReader(io.StringIO(to_csv(measured_with_all()))))
    assert len(lines) == 5
    for line in lines:
        assert (line["fid"], line["inception_score"], line["clip_score"]) == ("21.5", "3.25", "28.75")
        assert (line["split"], line["extractor"], line["reference_images"]) == ("heldout", "pixels at 8 px", "809")
        assert line["inception"]
        assert line["clip"]
        assert line["frechet_dims"]
    assert [line["images"] for line in lines] == ["5000"] * 4 + ["180"]
    assert [line["precision"] for line in lines] == ["0.71"] * 4 + ["0.9"]
    empty = next(csv.DictReader(io.StringIO(to_csv(table()))))
    assert (empty["fid"], empty["inception_score_deviation"], empty["clip_score"]) == ("", "", "")


def test_json_has_everything() -> None:
    quality = json.loads(to_json(measured_with_all()))
    assert quality["rows"][1]["cells"][0]["figures"]["recall"] == 0.62
    assert quality["rows"][1]["sampler"] == "ddim"
    assert quality["floor"]["fid"] == 21.5
    assert quality["provenance"]["inception"] == "Inception 6726825d"
