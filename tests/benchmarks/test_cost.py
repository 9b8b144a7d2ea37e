"""What a run costs: the arithmetic, and FLOPs counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from benchmarks.cost import STABLE_DIFFUSION, Flops, Plan, Speed, count_flops, main, middle, narrowed, speed_table
from tests import pipelines

PLAN = Plan(stage1_updates=100, rounds=(200, 300), batch_size=72, efficiency=0.5, price_per_hour=2.0)
SPEEDS = (Speed("stage 1", 2.0), Speed("stage 2", 4.0))
SMALL = {**STABLE_DIFFUSION, "block_out_channels": (32, 32, 64, 64), "cross_attention_dim": 32}


def test_hours_are_images_over_images_per_second() -> None:
    assert PLAN.hours(SPEEDS, devices=2) == pytest.approx((1.0, 2.5))


def test_more_devices_take_less_time_and_equal_device_hours() -> None:
    assert PLAN.table(SPEEDS, (2, 8)).splitlines()[2:] == [
        "| 2 | 36 | 1.0 | 2.5 | 3.5 | 7 | 14 |",
        "| 8 | 9 | 0.2 | 0.6 | 0.9 | 7 | 14 |",
    ]


def test_without_a_price_nothing_is_said_of_money() -> None:
    assert "cost" not in Plan(1, (1,), 8, 1.0).table(SPEEDS, (8,))


def test_the_share_of_the_peak_is_flops_times_images() -> None:
    line = speed_table([Speed("stage 1", 2.0, 2**30)], Flops(call=10**12, update=5 * 10**12), peak=4e13)
    assert line.splitlines()[2] == "| stage 1 | 2 (2 to 2) | 10 | 25% | 1.0 |"


def test_of_several_turns_the_median_speed_and_the_most_memory_count() -> None:
    found = middle([Speed("stage 1", 3.0, 5), Speed("stage 1", 1.0, 9), Speed("stage 1", 2.0, 7)])
    assert found == Speed("stage 1", 2.0, 9, (1.0, 3.0))


def test_an_update_is_two_calls_and_a_step_there_and_back() -> None:
    flops = count_flops(SMALL, side=16, gradient_checkpointing=False)
    assert 4.8 < flops.update / flops.call < 5.1


@pytest.mark.slow
def test_gradient_checkpointing_calls_the_network_once_more() -> None:
    flops, more = (count_flops(SMALL, 16, checkpointing) for checkpointing in (False, True))
    assert more.call == flops.call
    assert 0.7 < (more.update - flops.update) / flops.call <= 1.01


def test_a_width_that_leaves_no_groups_is_refused() -> None:
    assert narrowed(0.2)["block_out_channels"] == (64, 128, 256, 256)
    with pytest.raises(click.ClickException, match="do not divide by 32"):
        narrowed(0.25)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--devices", "8,many"], "numbers between commas"),
        (["--devices", "0"], "at least 1"),
        (["--devices", "7"], "7 devices cannot share batches of 512 rows equally"),
        (["--width", "0.25"], "do not divide"),
        (["--size", "100"], "a multiple of 64, not 100"),
    ],
)
def test_faulty_options_are_refused_in_a_line(arguments: list[str], named: str) -> None:
    result = CliRunner().invoke(main, ["--peak-tflops", "100", *arguments])
    assert result.exit_code
    assert named in result.output


def test_a_class_conditional_pipeline_is_refused(tmp_path: Path) -> None:
    folder = pipelines.class_unet(tmp_path / "classes")
    result = CliRunner().invoke(main, ["--checkpoint", str(folder)])
    assert "is not a text-to-image pipeline" in result.output


@pytest.mark.slow
@pytest.mark.parametrize("make", [pipelines.stable_diffusion, pipelines.stable_diffusion_xl])
def test_a_checkpoint_is_timed_in_both_stages(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    checkpoint = make(tmp_path / "sd")
    options = [
        "--size",
        "64",
        "--batch",
        "2",
        "--precision",
        "fp32",
        "--updates",
        "1",
        "--repeats",
        "1",
        "--gradient-checkpointing",
    ]
    result = CliRunner().invoke(main, ["--checkpoint", str(checkpoint), *options])
    assert result.exit_code == 0, result.output
    assert "| stage 1 |" in result.output
    assert "| stage 2 |" in result.output
    assert "| 64 | 8 |" in result.output
