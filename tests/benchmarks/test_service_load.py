"""The benchmark of the service runs on a tiny bundle, and says what it is to say."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from benchmarks.service_load import main
from tests.bundles import make_tiny_bundle


def test_all_four_loads_are_measured(tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path, size=16)
    options = "--backend fake --threads 1 --requests 12 --images 12 --rounds 1 --repeats 2 --overload-s 0.5"
    result = CliRunner().invoke(main, ["--bundle", str(bundle.path), *options.split()], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "12 of 12 images within 2 of 255" in result.output
    for said in ("saturation, 12 images", "one at a time, 2 requests", "overload, 10 times capacity", "Retry-After"):
        assert said in result.output
