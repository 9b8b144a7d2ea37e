"""The comparison with the LCM script: the parts that need no script."""

from __future__ import annotations

import json
from enum import Enum
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import click
import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

from benchmarks.against_lcm import AS_IT_IS, Setting, in_turn, ratios, sides, table
from benchmarks.lcm_process import STAND_INS, Example, update_times
from benchmarks.small_pipeline import make_checkpoint, write_images
from benchmarks.stages import seconds_of
from tests import pipelines

SCRIPT = """
import sys, time
print("Configuration saved", file=sys.stderr)
count = int(next(a for a in sys.argv if a.startswith("--max_train_steps=")).split("=")[1])
for update in range(count + 1):
    print(f"\\rSteps:  10%|#  | {update}/{count} [00:00<?, ?it/s]", end="", file=sys.stderr, flush=True)
    time.sleep(0.02)
"""


class Interpolation(Enum):
    BILINEAR = Image.Resampling.BILINEAR


def bar(update: int) -> str:
    return f"\rSteps:  10%|█  | {update}/5 [00:00<00:01,  1.4it/s, loss=0.6]"


def test_an_update_is_done_when_the_bar_first_says_so() -> None:
    chunks = [(0.0, "Loading weights: 100%|█| 68/68 [00:00<"), (1.0, bar(0)), (2.5, bar(1)), (2.7, bar(1) + bar(2))]
    assert update_times(chunks) == [1.0, 2.5, 2.7]


def test_a_bar_may_come_in_pieces() -> None:
    assert update_times([(1.0, bar(0) + bar(1)[:19]), (2.0, bar(1)[19:])]) == [1.0, 2.0]


def test_a_script_is_timed_after_its_first_updates(tmp_path: Path) -> None:
    assert len(example(tmp_path, SCRIPT).seconds(3, full_precision=False)) == 3


def test_a_script_in_full_precision_runs_as_the_main_module(tmp_path: Path) -> None:
    script = SCRIPT.replace("import sys, time", "import sys, time, torch\nassert __name__ == '__main__'") + (
        "\nassert torch.get_autocast_dtype('cpu') == torch.float32 and sys.argv[0].endswith('script.py')"
    )
    assert len(example(tmp_path, script).seconds(1, full_precision=True)) == 1


def test_a_script_that_fails_is_told_by_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(click.ClickException, match="did 0 of 5 updates: ValueError: no shards"):
        example(
            tmp_path, 'import sys\nsys.stderr.write("Steps:   0%|  | 0/5 [0\\n")\nraise ValueError("no shards")'
        ).seconds(3, full_precision=False)


def example(folder: Path, script: str) -> Example:
    (folder / "script.py").write_text(script)
    shards = write_images(folder / "images", images=2, per_shard=1, size=8)
    return Example(folder / "script.py", folder, shards, 8, 2, "fp32", 1)


def test_seconds_of_an_update_come_from_the_log(tmp_path: Path) -> None:
    write_log(tmp_path / "log.jsonl", skipped=0)
    assert seconds_of(tmp_path / "log.jsonl") == [2.0, 1.0]


def test_a_skipped_update_is_no_measurement(tmp_path: Path) -> None:
    write_log(tmp_path / "log.jsonl", skipped=1)
    with pytest.raises(click.ClickException, match="1 updates were skipped"):
        seconds_of(tmp_path / "log.jsonl")


def write_log(path: Path, skipped: int) -> None:
    lines = [
        {"update": k + 1, "images": 4 * (k + 1), "images_per_s": 2.0 * (k + 1), "skipped": skipped} for k in (0, 1)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_sides_take_turns_and_give_medians() -> None:
    order: list[str] = []

    def side(name: str, seconds: float) -> list[float]:
        order.append(name)
        return [seconds, seconds, 100.0]

    found = in_turn({"a": lambda updates: side("a", 2.0), "b": lambda updates: side("b", 1.0)}, rounds=2, updates=3)
    assert order == ["a", "b", "a", "b"]
    assert found == {"a": [2.0, 2.0], "b": [1.0, 1.0]}


def test_a_ratio_above_one_means_faster_than_theirs() -> None:
    assert ratios([1.0, 1.0, 2.0], [2.0, 3.0, 2.0]) == "2.00 (1.00 to 3.00)"


def test_the_table_has_images_per_second() -> None:
    assert "| stage 1 | 0.500 | 8.00 | 2.00 (2.00 to 2.00) |" in table({AS_IT_IS: [1.0], "stage 1": [0.5]}, 4)


def test_the_small_checkpoint_is_a_stock_pipeline(tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(make_checkpoint(tmp_path / "made"), safety_checker=None)
    assert sum(p.numel() for p in pipeline.unet.parameters()) == pytest.approx(15e6, rel=0.05)
    assert len(pipeline.tokenizer("a red square").input_ids) == 12, "ten letters and two marks"


def test_both_stages_are_timed_on_images_and_on_tensors(tmp_path: Path) -> None:
    checkpoint = pipelines.stable_diffusion(tmp_path / "sd")
    images = write_images(tmp_path / "images", images=8, per_shard=2, size=pipelines.SIZE)
    setting = Setting(checkpoint, images, pipelines.SIZE, 2, "fp32", 1)
    compared = dict(sides(setting, tmp_path / "script.py", None, tmp_path))
    ours = [side for name, side in compared.items() if name.startswith("stage")]
    assert len(ours) == 4
    for side in ours:
        assert len(side(1)) == len(side(1)) == 1


def test_the_stand_in_scales_crops_and_normalises() -> None:
    spec = spec_from_file_location("functional", STAND_INS / "torchvision" / "transforms" / "functional.py")
    assert spec
    assert spec.loader
    functional = module_from_spec(spec)
    spec.loader.exec_module(functional)
    small = functional.resize(Image.new("RGB", (20, 10), (255, 0, 0)), 5, Interpolation.BILINEAR)
    assert small.size == (10, 5)
    made = functional.normalize(functional.to_tensor(functional.crop(small, 0, 3, 5, 5)), [0.5], [0.5])
    assert made.shape == (3, 5, 5)
    assert made[:, 0, 0].tolist() == [1.0, -1.0, -1.0]
