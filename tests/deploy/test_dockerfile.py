"""The images: what goes in is there, what they install is what the project asks for, and both end alike."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from dockerfile_parse import DockerfileParser

from service.settings import Settings
from tests.deploy.conftest import RunTool

Instruction = tuple[str, str]


@pytest.fixture(scope="module")
def stages(root: Path) -> dict[str, list[Instruction]]:
    """The instructions of each stage, by its name."""
    stages: dict[str, list[Instruction]] = {}
    for step in DockerfileParser(str(root / "Dockerfile")).structure:
        if step["instruction"] == "FROM":
            name = step["value"].split(" AS ")[1]
            stages[name] = []
        elif step["instruction"] != "COMMENT":
            stages[name].append((step["instruction"], step["value"]))
    return stages


@pytest.fixture(scope="module")
def project(root: Path) -> dict[str, Any]:
    read: dict[str, Any] = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    return read


@pytest.fixture(params=["cpu", "gpu"])
def image(request: pytest.FixtureRequest, stages: dict[str, list[Instruction]]) -> list[Instruction]:
    """The instructions of an image's last stage."""
    return stages[request.param]


def test_hadolint_finds_nothing(run_tool: RunTool) -> None:
    run_tool("hadolint", "Dockerfile")


def test_the_image_for_cpus_is_the_default(stages: dict[str, list[Instruction]]) -> None:
    assert list(stages)[-1] == "cpu"


def test_what_is_copied_is_there_and_not_ignored(root: Path, stages: dict[str, list[Instruction]]) -> None:
    let_through = re.findall(r"^!(\S+)$", (root / ".dockerignore").read_text(), re.MULTILINE)
    copied: set[str] = set()
    for instructions in stages.values():
        for _, value in (step for step in instructions if step[0] == "COPY"):
            if value.startswith("--from="):
                assert value.split()[0].removeprefix("--from=") in stages
            else:
                copied |= set(value.split()[:-1])
    assert copied == set(let_through)
    assert all((root / name).exists() for name in copied)


def test_the_wheel_has_every_package(project: dict[str, Any], stages: dict[str, list[Instruction]]) -> None:
    packages = {value.split()[0] for name, value in stages["wheel"] if name == "COPY" and len(value.split()) == 2}
    assert {"engines", "service", "training"} <= packages
    assert {project["readme"], *project["license-files"]} <= {
        word for name, value in stages["wheel"] if name == "COPY" for word in value.split()
    }


def test_packages_are_locked(stages: dict[str, list[Instruction]]) -> None:
    installs = [
        command
        for instructions in stages.values()
        for name, value in instructions
        if name == "RUN"
        for command in value.split("&&")
        if "pip install" in command
    ]
    assert len(installs) == 6
    for command in installs:
        assert "-c requirements.lock" in command or "--no-deps" in command


def test_extras_are_those_of_the_project_and_bring_no_torch(
    project: dict[str, Any], stages: dict[str, list[Instruction]]
) -> None:
    extras: dict[str, set[str]] = {}
    for stage, instructions in stages.items():
        for name, value in instructions:
            if name == "RUN" and (own := re.search(r"-c requirements\.lock '?\.(?:\[([\w,-]+)\])?", value)):
                extras[stage] = set((own[1] or "").split(",")) - {""}
    assert extras == {"cpu-dependencies": {"tracing"}, "gpu-dependencies": {"gpu", "tensorrt-rtx", "tracing"}}
    offered: dict[str, list[str]] = project["optional-dependencies"]
    for stage in extras.values():
        assert stage <= offered.keys()
        wanted = [*project["dependencies"], *(name for extra in stage for name in offered[extra])]
        assert not any(re.match(r"torch\b|diffusers|transformers|accelerate", name) for name in wanted)


def test_both_images_end_alike(stages: dict[str, list[Instruction]]) -> None:
    cpu, gpu = (
        [(name, value.replace(f"{stage}-dependencies", "dependencies").split()) for name, value in stages[stage]]
        for stage in ("cpu", "gpu")
    )
    assert cpu == [(name, [word for word in words if word != "FEWSTEP_BACKEND=auto"]) for name, words in gpu]


def test_nothing_is_reported_to_others(image: list[Instruction]) -> None:
    assert _environment(image)["ORT_DISABLE_TELEMETRY"] == "1"


def test_settings_of_the_image_are_settings(image: list[Instruction], monkeypatch: pytest.MonkeyPatch) -> None:
    environment = _environment(image)
    own = {name: value for name, value in environment.items() if name.startswith("FEWSTEP_")}
    assert {name.removeprefix("FEWSTEP_").lower() for name in own} <= Settings.model_fields.keys()
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.host == "0.0.0.0"
    folders = " ".join(value for name, value in image if name == "RUN")
    assert f"install -d -o fewstep -g fewstep /var/lib/fewstep {settings.plans}" in folders
    assert ("EXPOSE", str(settings.port)) in image
    [health] = [value for name, value in image if name == "HEALTHCHECK"]
    assert f"http://127.0.0.1:{settings.port}/livez" in health


def test_the_process_is_no_root_and_hears_the_signal(image: list[Instruction]) -> None:
    last = dict(image)
    assert last["USER"] == "10001:10001"
    assert last["STOPSIGNAL"] == "SIGTERM"
    assert json.loads(last["ENTRYPOINT"]) == ["fewstep"]
    assert json.loads(last["CMD"]) == ["serve"]


def _environment(image: list[Instruction]) -> dict[str, str]:
    [variables] = [value for name, value in image if name == "ENV"]
    return dict(word.split("=", 1) for word in variables.split())
