"""How far images are from fp32 in each precision: on a tiny bundle, against PyTorch where it has programs."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import precisions
from tests.bundles import make_tiny_bundle
from tests.programs import with_programs


@pytest.mark.parametrize(("programmed", "images"), [(False, 1), (True, 2)])
def test_every_precision_is_rounded_and_stays_near(tmp_path: Path, programmed: bool, images: int) -> None:
    bundle = make_tiny_bundle(tmp_path, "text", "latent")
    if programmed:
        bundle = with_programs(bundle, tmp_path)
    result = CliRunner().invoke(precisions.main, [str(bundle.path), "--rows", f"{images}"])
    assert result.exit_code == 0, result.output
    head, _, *lines, empty, int8, fp8 = result.output.splitlines()[2:]
    assert empty == ""
    for name, left_out in (("int8", int8), ("fp8", fp8)):
        assert left_out.startswith(f"{name} is left out: ")
        assert "opset 18" in left_out
    assert ("PyTorch" if programmed else "ONNX Runtime") in head
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [(row[0], row[1]) for row in rows] == [(name, steps) for steps in "421" for name in ("fp16", "bf16")]
    for name, _, most, mean, *_, decibels in rows:
        assert 1e-6 < float(mean) <= float(most) < 0.2, name
        assert float(decibels) > 30, name
