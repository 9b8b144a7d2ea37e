"""Prometheus finds every process, and its alerts read what the service exports."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from service.jobs import FailureReason
from service.middleware import _outcome
from service.settings import Settings
from service.telemetry.metrics import Metrics
from tests.deploy.conftest import RunTool
from tests.deploy.promql import unknown, uses

Alert = dict[str, Any]


@pytest.fixture(scope="module")
def folder(root: Path) -> Path:
    return root / "deploy" / "prometheus"


@pytest.fixture(scope="module")
def alerts(folder: Path) -> dict[str, Alert]:
    [group] = yaml.safe_load((folder / "alerts.yml").read_text())["groups"]
    return {rule["alert"]: rule for rule in group["rules"]}


@pytest.mark.parametrize(
    ("expression", "wrong"),
    [
        ('sum by (endpoint) (rate(fewstep_requests_total{outcome="ok"}[5m]))', set()),
        ("sum by (model) (rate(fewstep_requests_total[5m]))", {"fewstep_requests_total{model}"}),
        ('max_over_time(sum(fewstep_worker_up{kind="gpu"})[1h:1m])', {"fewstep_worker_up{kind}"}),
        ("(sum(up) or vector(0)) < 1 and fewstep_queue_depths > 0", {"fewstep_queue_depths"}),
        ("histogram_quantile(0.9, sum by (le) (rate(fewstep_tick_rows_sum[1m])))", {"fewstep_tick_rows_sum{le}"}),
    ],
)
def test_what_nobody_exports_is_found(expression: str, wrong: set[str], exported: dict[str, frozenset[str]]) -> None:
    assert unknown(expression, exported) == wrong


def test_alerts_read_what_the_service_exports(alerts: dict[str, Alert], exported: dict[str, frozenset[str]]) -> None:
    assert {name: wrong for name, alert in alerts.items() if (wrong := unknown(alert["expr"], exported))} == {}


@pytest.mark.parametrize(
    ("endpoints", "right"),
    [
        ("generate|edit|inpaint|openai_generations|openai_edits", True),
        ("generate|edit|inpaint", False),
        (".*", False),
        (None, False),
    ],
)
def test_endpoints_that_are_left_out_are_found(
    endpoints: str | None, right: bool, misfiltered: Callable[[str], set[str]]
) -> None:
    of = "" if endpoints is None else f'{{endpoint=~"{endpoints}"}}'
    assert (misfiltered(f"rate(fewstep_requests_total{of}[5m]) / rate(fewstep_images_total[5m])") == set()) == right


def test_alerts_see_every_endpoint_that_makes_images(
    alerts: dict[str, Alert], misfiltered: Callable[[str], set[str]]
) -> None:
    assert {name: wrong for name, alert in alerts.items() if (wrong := misfiltered(alert["expr"]))} == {}


def test_alerts_name_outcomes_that_there_are(alerts: dict[str, Alert]) -> None:
    there = {
        "fewstep_requests_total": {_outcome(status) for status in range(200, 600)},
        "fewstep_jobs_total": {"done", *get_args(FailureReason)},
    }
    for alert in alerts.values():
        for name, use in uses(alert["expr"]).items():
            if "outcome" in use.values:
                assert use.values["outcome"] <= there[name]


def test_alerts_name_reasons_that_are_counted(root: Path, alerts: dict[str, Alert]) -> None:
    source = "".join(path.read_text() for path in (root / "service").rglob("*.py"))
    read = [use for alert in alerts.values() for use in uses(alert["expr"]).values()]
    reasons = {reason for use in read for reason in use.values["reason"]}
    assert "too_many_connections" in reasons
    assert {reason for reason in reasons if f'"{reason}"' not in source} == set()


def test_every_alert_says_what_it_means_and_what_to_do(root: Path, alerts: dict[str, Alert]) -> None:
    headings = re.findall(r"^#+ (.+)$", (root / "docs" / "operations.md").read_text(), re.MULTILINE)
    pages = {f"docs/operations.md#{heading.lower().replace(' ', '-')}" for heading in headings}
    for alert in alerts.values():
        assert alert["annotations"].keys() == {"summary", "description", "runbook"}
        assert alert["annotations"]["runbook"] in pages
        assert alert["labels"]["severity"] in ("warning", "critical")


def test_every_alert_is_seen_to_fire_and_to_be_silent(folder: Path, alerts: dict[str, Alert]) -> None:
    groups = yaml.safe_load((folder / "alerts_test.yml").read_text())["tests"]
    cases = {(case["alertname"], bool(case["exp_alerts"])) for group in groups for case in group["alert_rule_test"]}
    assert cases == {(name, fires) for name in alerts for fires in (True, False)}


def test_thresholds_are_those_of_the_settings(alerts: dict[str, Alert]) -> None:
    settings = Settings()
    assert _threshold(alerts["FewstepNotBatching"]) == settings.max_batch
    metrics = Metrics()
    assert _threshold(alerts["FewstepSlow"]) in metrics.request_seconds._kwargs["buckets"]
    assert _threshold(alerts["FewstepQueueOld"]) in metrics.queue_ratio._upper_bounds


def test_it_scrapes_the_services_by_name_on_the_port_of_the_image(root: Path, folder: Path) -> None:
    services = yaml.safe_load((root / "docker-compose.yml").read_text())["services"]
    jobs = yaml.safe_load((folder / "prometheus.yml").read_text())["scrape_configs"]
    found = {job["job_name"]: job["dns_sd_configs"][0] for job in jobs if "dns_sd_configs" in job}
    assert found.keys() == {"api", "worker"}
    for name, discovery in found.items():
        assert discovery["names"] == [name]
        assert name in services
        assert f"FEWSTEP_PORT={discovery['port']} " in (root / "Dockerfile").read_text()


def test_promtool_accepts_the_configuration(run_tool: RunTool) -> None:
    run_tool("promtool", "check", "config", "deploy/prometheus/prometheus.yml")


def test_promtool_runs_the_tests_of_the_alerts(run_tool: RunTool) -> None:
    run_tool("promtool", "test", "rules", "deploy/prometheus/alerts_test.yml")


def _threshold(alert: Alert) -> float:
    """The number that the expression ends with."""
    return float(alert["expr"].split()[-1])
