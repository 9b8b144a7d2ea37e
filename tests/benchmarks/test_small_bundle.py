"""The heavier bundle of the benchmarks is one that a service runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import small_bundle
from benchmarks.small_pipeline import SIZE
from engines.pipeline import Generate, Pipeline


@pytest.mark.slow
def test_it_is_written_and_makes_images(tmp_path: Path) -> None:
    result = CliRunner().invoke(small_bundle.main, [str(tmp_path / "small")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "int8 weights" in result.output
    with Pipeline.open(tmp_path / "small", threads=1) as pipeline:
        assert {student.steps for student in pipeline.manifest.students} == set(small_bundle.STEPS)
        for steps in small_bundle.STEPS:
            [image] = pipeline.run([Generate("a red square", steps, 1.0, 1)])
            assert image.shape == (SIZE, SIZE, 3)
