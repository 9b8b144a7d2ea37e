"""One step in torch, timed: on a CPU and a small network here."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from benchmarks.step import Ceilings, Timing, limit, main, table

CEILINGS = Ceilings(operations=1e12, bytes=1e11)


def test_shares_and_floors_are_those_of_the_ceilings() -> None:
    line = table([Timing("eager", 4, 0.1)], flops=1e10, weight_bytes=10**9, ceilings=CEILINGS).splitlines()[2]
    assert line.startswith("| eager | 4 | 100 | 40 | 40% | 40 | 10 | kernels that move activations")


@pytest.mark.parametrize(
    ("timing", "share", "floors", "said"),
    [
        (Timing("eager", 1, 0.1, busy=0.3), 0.7, (0.07, 0.01), "launching kernels: the device is busy 30%"),
        (Timing("eager", 1, 0.1, busy=0.95), 0.7, (0.07, 0.01), "arithmetic"),
        (Timing("eager", 1, 0.1), 0.1, (0.01, 0.05), "reading the weights"),
        (Timing("eager", 1, 0.1), 0.3, (0.03, 0.01), "kernels that move activations"),
    ],
)
def test_the_limit_is_what_the_numbers_say(
    timing: Timing, share: float, floors: tuple[float, float], said: str
) -> None:
    assert limit(timing, share, floors).startswith(said)


def test_it_times_and_compares_with_fp32() -> None:
    options = ["--width", "0.1", "--size", "64", "--rows", "1,2", "--ways", "eager", "--repeats", "1"]
    result = CliRunner().invoke(main, options)
    assert result.exit_code == 0, result.output
    rows = [line.split("|") for line in result.output.splitlines() if line.startswith("| eager")]
    assert len(rows) == 4
    assert all(float(cells[3]) > 0 for cells in rows)
    assert all(30 < float(cells[5]) < 100 for cells in rows[2:])


def test_a_way_that_it_does_not_know_is_named() -> None:
    assert "'fast' is not one of eager" in CliRunner().invoke(main, ["--ways", "fast"]).output
