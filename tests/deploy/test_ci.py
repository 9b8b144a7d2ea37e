"""What CI runs ends well only if all of it does, and says at its end what it left out."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.deploy.conftest import RunTool

SKIPPED = "SKIPPED [1] tests/deploy/conftest.py:1: promtool is not installed"


def ci(root: Path, folder: Path, test: str, check: str = "echo checked") -> subprocess.CompletedProcess[str]:
    """What CI does where `make test` and `make check` do these."""
    make = folder / "make"
    make.write_text(f'#!/bin/sh\ncase "$1" in test) {test};; check) {check};; esac\n')
    make.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run([root / ".ci" / "run"], env=environment, capture_output=True, text=True, check=False)


def test_what_was_skipped_is_said_at_the_end(root: Path, tmp_path: Path) -> None:
    ended = ci(root, tmp_path, f"echo '{SKIPPED}'; echo '1 passed'")
    assert ended.returncode == 0
    assert ended.stdout.splitlines()[-3:] == ["checked", "NOT CHECKED, for want of what is named:", SKIPPED]


def test_nothing_is_said_where_nothing_was_skipped(root: Path, tmp_path: Path) -> None:
    ended = ci(root, tmp_path, "echo '1 passed'")
    assert (ended.returncode, ended.stdout.splitlines()) == (0, ["1 passed", "checked"])


@pytest.mark.parametrize(("test", "check"), [("exit 1", "echo checked"), ("echo '1 passed'", "exit 1")])
def test_a_failure_is_one(root: Path, tmp_path: Path, test: str, check: str) -> None:
    assert ci(root, tmp_path, test, check).returncode != 0


def test_a_tool_that_is_missing_is_named_with_what_it_would_have_run(run_tool: RunTool) -> None:
    with pytest.raises(pytest.skip.Exception, match=r"not installed, so this was not run: no-such-tool check a\.yml"):
        run_tool("no-such-tool", "check", "a.yml")
