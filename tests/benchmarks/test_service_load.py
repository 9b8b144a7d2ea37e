"""The benchmarks of the service run on a tiny bundle, and say what they are to say."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import click
from click.testing import CliRunner

from benchmarks import service_load, service_overload
from benchmarks.service_overload import Tally, lines
from tests.bundles import make_tiny_bundle


def output_of(command: click.Command, folder: Path, options: str) -> str:
    bundle = make_tiny_bundle(folder, size=16)
    arguments = ["--bundle", str(bundle.path), "--backend", "fake", "--threads", "1", *options.split()]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_all_three_loads_are_measured(tmp_path: Path) -> None:
    said = output_of(service_load.main, tmp_path, "--requests 12 --images 12 --rounds 1 --repeats 2")
    assert "12 of 12 images within 2 of 255" in said
    for part in ("saturation, 1 rounds of 12 images", "one at a time, 2 pairs of 4 steps"):
        assert part in said


def test_an_overload_is_measured(tmp_path: Path) -> None:
    said = output_of(service_overload.main, tmp_path, "--seconds 0.3 --images 1")
    for part in ("capacity", "first tries: ", "back after Retry-After", "p99", "memory", "lone requests are served"):
        assert part in said


def test_those_who_came_back_are_counted_apart() -> None:
    tally = Tally(Counter({200: 3, 429: 6, 504: 1}), Counter({200: 4, 429: 1}), [1.0] * 7 + [9.0], [1.0, 20.0], [5.0])
    first, back, late, memory = lines(tally, 10_000)
    assert first == "first tries: 3 x 200, 6 x 429, 1 x 504; told 1 to 20 s"
    assert "4 of 5 let in" in back
    assert "of 8 that were let in 1 came too late (504); p50 1.00 s, p99 9.00 s, time limit 10 s" in late
    assert memory.endswith("5, 5, 5, 5, 5")
