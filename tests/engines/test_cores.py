"""How many cores a process may use: its container's or its slice's quota, whichever version of cgroups has it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from engines.backends import cores


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root folder of a machine of 64 cores, still without cgroups."""
    monkeypatch.setattr(cores, "_ROOT", tmp_path)
    monkeypatch.setattr(cores, "_allowed_cpus", lambda: set(range(64)))
    monkeypatch.setattr(cores, "_physical_cores", len)
    return tmp_path


def write(root: Path, own: str, files: Mapping[str, str]) -> None:
    """The cgroups of this process, and files below those of all."""
    for path, text in {"proc/self/cgroup": own, **{f"sys/fs/cgroup/{name}": files[name] for name in files}}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(f"{text}\n")


@pytest.mark.parametrize(
    ("text", "expected"), [("150000 100000", 2), ("50000 100000", 1), ("400000 100000", 4), ("max 100000", 64)]
)
def test_the_container_quota_bounds_the_threads(root: Path, text: str, expected: int) -> None:
    write(root, "0::/", {"cpu.max": text})
    assert cores.usable_cores() == expected


@pytest.mark.parametrize(
    ("slice_", "service", "expected"),
    [("max 100000", "200000 100000", 2), ("300000 100000", "max 100000", 3), ("300000 100000", "800000 100000", 3)],
)
def test_the_least_quota_on_the_way_up_bounds_the_threads(root: Path, slice_: str, service: str, expected: int) -> None:
    files = {"system.slice/cpu.max": slice_, "system.slice/fewstep.service/cpu.max": service}
    write(root, "0::/system.slice/fewstep.service", files)
    assert cores.usable_cores() == expected


@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
@pytest.mark.parametrize("place", ["docker/ab12", ""], ids=["its own", "the root that a container is shown"])
@pytest.mark.parametrize(("quota", "expected"), [("250000", 3), ("-1", 64)])
def test_a_quota_of_cgroups_version_1_bounds_the_threads(
    root: Path, mount: str, place: str, quota: str, expected: int
) -> None:
    folder = Path(mount, place)
    files = {str(folder / "cpu.cfs_quota_us"): quota, str(folder / "cpu.cfs_period_us"): "100000"}
    write(root, "9:name=systemd:/\n3:cpuset:/\n1:cpu,cpuacct:/docker/ab12\n0::/", files)
    assert cores.usable_cores() == expected


def test_other_cgroups_do_not_bound_the_threads(root: Path) -> None:
    write(root, "3:cpuset:/a\n0::/a", {"b/cpu.max": "100000 100000", "cpuset/a/cpu.max": "100000 100000"})
    assert cores.usable_cores() == 64


def test_usable_cores_is_positive_without_cgroup_or_topology(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_ROOT", tmp_path)
    monkeypatch.setattr(cores, "_SIBLINGS", str(tmp_path / "{}"))
    assert cores.usable_cores() >= 1
