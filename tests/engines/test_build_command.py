"""`fewstep build`, with a library that builds nothing: how it ends, and what it prints."""

from __future__ import annotations

import re
import shlex
import signal
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from engines import compile as compiling
from engines.backends.base import EngineError
from engines.backends.trt_library import Library
from engines.build_command import UNHANDLED, build
from engines.bundle import Bundle
from tests.engines.made_up_trt import MADE_UP


@pytest.fixture(autouse=True)
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "find_library", lambda check: Library(MADE_UP))
    monkeypatch.setattr(compiling, "build_plan", lambda *_: b"plan")


def call(bundle: Bundle, plans: Path, *options: str) -> Result:
    return CliRunner().invoke(build, [str(bundle.path), "--target", "sm89", "--plans", str(plans), *options])


@pytest.fixture
def building(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """A library whose builds ask whether to go on and swallow what is raised meanwhile; a signal comes with the second.

    The graphs that are built, and a scratch folder of their own.
    """
    built: list[str] = []
    number: signal.Signals = getattr(request, "param", signal.SIGINT)

    def build_plan(*given: Any) -> bytes:
        *_, progress, name = given
        built.append(name)
        with suppress(KeyboardInterrupt):  # as the library's own callbacks do
            if len(built) == 2:
                signal.raise_signal(number)
        if not progress("compiling", 1, 2):
            raise EngineError(f"{name}: it was not built")
        return b"plan"

    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    monkeypatch.setattr(compiling, "build_plan", build_plan)
    former = {number: signal.signal(number, default) for number, default in UNHANDLED.items()}
    yield built
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("building", "code", "says"), [(signal.SIGINT, 1, "Aborted!\n"), (signal.SIGTERM, 143, "")], indirect=["building"]
)
def test_ctrl_c_and_sigterm_end_a_build(
    text_bundle: Bundle, tmp_path: Path, building: list[str], code: int, says: str
) -> None:
    """Plans that were built before it stay, and nothing else."""
    result = call(text_bundle, tmp_path / "plans")
    assert (result.exit_code, result.stderr) == (code, says)
    assert building == list(text_bundle.graphs())[:2]
    assert [line.split()[0] for line in result.stdout.splitlines()] == building[:1]
    assert len(list((tmp_path / "plans").iterdir())) == 1
    assert not list((tmp_path / "scratch").iterdir())
    assert all(signal.getsignal(number) is default for number, default in UNHANDLED.items())


def test_ctrl_c_is_left_to_whoever_handles_it(text_bundle: Bundle, tmp_path: Path, building: list[str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    result = call(text_bundle, tmp_path / "plans")
    assert result.exit_code == 0, result.output
    assert building == list(text_bundle.graphs())
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_bundles_build_outside_of_the_main_thread(text_bundle: Bundle, tmp_path: Path, building: list[str]) -> None:
    """Where no handler can be set, and Ctrl-C does not come."""
    building.append("another")
    building.append("a third")
    with ThreadPoolExecutor(1) as threads:
        result = threads.submit(call, text_bundle, tmp_path / "plans").result()
    assert result.exit_code == 0, result.output


def test_a_build_that_fails_is_an_error_that_names_the_graph_of_the_bundle(text_bundle: Bundle, tmp_path: Path) -> None:
    result = call(text_bundle, tmp_path / "plans", "--precision", "int8")
    assert re.fullmatch(r"Error: text\.onnx: a graph of opset \d+ cannot have int8 weights; .*\n", result.stderr)


def test_the_options_that_it_prints_are_quoted(text_bundle: Bundle, tmp_path: Path) -> None:
    plans = tmp_path / "of $HOME; it's mine"
    result = call(text_bundle, plans)
    assert result.exit_code == 0, result.output
    serve, generate = (shlex.split(line.partition("  (or")[0]) for line in result.stdout.splitlines()[-2:])
    for words in (serve, generate):
        assert words[words.index("--plans") + 1] == str(plans)
