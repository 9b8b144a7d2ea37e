"""Type checkers of those who install the package believe its types only where a file says that they may."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_packages_that_are_checked_say_that_they_are_typed() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    for package in tools["mypy"]["packages"]:
        assert "py.typed" in tools["setuptools"]["package-data"][package]
        assert (ROOT / package / "py.typed").is_file()
