"""One step in torch, timed: on a CPU and a small network here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import step
from benchmarks.step import HEAD, Ceilings, Distance, Step, Timing, eager, limit, line, main

CEILINGS = Ceilings(operations=1e12, bytes=1e11)


def test_shares_and_floors_are_those_of_the_ceilings() -> None:
    told = line(Timing("eager", 4, 0.1), Distance(1, 0.5, 40), flops=1e10, weight_bytes=10**9, ceilings=CEILINGS)
    assert told.startswith("| eager | 4 | 100 | 40 | 40% | 40 | 10 | kernels that move activations")
    assert told.endswith(" | 1 | 0.5 | 40.0 |")
    assert told.count("|") == HEAD.splitlines()[0].count("|")


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


OPTIONS = ["--width", "0.1", "--size", "64", "--repeats", "1"]


@pytest.mark.slow
def test_it_times_and_compares_with_fp32() -> None:
    result = CliRunner().invoke(main, [*OPTIONS, "--rows", "1,2", "--ways", "eager"])
    assert result.exit_code == 0, result.output
    rows = [told.split("|") for told in result.output.splitlines() if told.startswith("| eager")]
    assert len(rows) == 2
    assert all(float(cells[3]) > 0 for cells in rows)
    assert all(30 < float(cells[11]) < 100 for cells in rows)


@pytest.mark.slow
def test_a_run_that_is_cut_off_keeps_what_it_had_eager_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_off(*_: object) -> Step:
        raise KeyboardInterrupt

    monkeypatch.setattr(step, "WAYS", {"eager": eager, "compiled": cut_off})
    result = CliRunner().invoke(main, [*OPTIONS, "--rows", "1,2", "--ways", "compiled,eager", "--precision", "fp32"])
    assert result.exit_code == 1
    kept = [told.split("|")[2] for told in result.output.splitlines() if told.startswith("| eager")]
    assert kept == [" 1 ", " 2 "]


def test_a_way_that_it_does_not_know_is_named() -> None:
    assert "'fast' is not one of eager" in CliRunner().invoke(main, ["--ways", "fast"]).output


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch's of itself, in exporting
def test_what_is_compiled_ahead_of_time_is_kept_and_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [*OPTIONS, "--rows", "1", "--ways", "aot", "--precision", "fp32", "--packages", str(tmp_path)]
    first = CliRunner().invoke(main, options)
    assert first.exit_code == 0, first.output
    assert [path.name for path in tmp_path.iterdir()] == ["0.1-64-1-fp32-cpu.pt2"]
    monkeypatch.setattr(torch.export, "export", None)
    again = CliRunner().invoke(main, options)
    assert again.exit_code == 0, again.output
    assert float(again.output.splitlines()[-1].split("|")[11]) > 80
