"""The dashboard shows what the service exports, and Grafana is told where it lies."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.promql import unknown

Panel = dict[str, Any]


@pytest.fixture(scope="module")
def folder(root: Path) -> Path:
    return root / "deploy" / "grafana"


@pytest.fixture(scope="module")
def dashboard(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "dashboards" / "fewstep.json").read_text())
    return read


@pytest.fixture(scope="module")
def panels(dashboard: dict[str, Any]) -> list[Panel]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def expressions(dashboard: dict[str, Any], panel: Panel) -> list[str]:
    """What a panel asks for, with the dashboard's variables filled in."""
    variables = {variable["name"]: ".*" for variable in dashboard["templating"]["list"]} | {"__rate_interval": "1m"}
    return [re.sub(r"\$(\w+)", lambda name: variables[name[1]], target["expr"]) for target in panel["targets"]]


def test_expressions_read_what_the_service_exports(
    dashboard: dict[str, Any], panels: list[Panel], exported: dict[str, frozenset[str]]
) -> None:
    for panel in panels:
        for expression in expressions(dashboard, panel):
            assert unknown(expression, exported) == set(), panel["title"]


def test_panels_of_requests_show_every_endpoint_that_makes_images(
    dashboard: dict[str, Any], panels: list[Panel], misfiltered: Callable[[str], set[str]]
) -> None:
    for panel in panels:
        for expression in expressions(dashboard, panel):
            assert misfiltered(expression) == set(), panel["title"]


def test_every_metric_of_the_service_is_on_it(panels: list[Panel], exported: dict[str, frozenset[str]]) -> None:
    text = " ".join(target["expr"] for panel in panels for target in panel["targets"])
    names = {name for name in exported if name.startswith("fewstep_") and not name.endswith("_created")}
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}
    assert {family for family in families if family not in text} == set()


def test_every_panel_says_what_it_shows(dashboard: dict[str, Any], panels: list[Panel]) -> None:
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in panels:
        assert panel["title"]
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["targets"]
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)


def test_no_panel_covers_another(dashboard: dict[str, Any]) -> None:
    for one, other in combinations([panel["gridPos"] for panel in dashboard["panels"]], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below
        assert one["x"] + one["w"] <= 24


def test_it_asks_the_source_that_is_provisioned(folder: Path, dashboard: dict[str, Any], panels: list[Panel]) -> None:
    [source] = yaml.safe_load((folder / "provisioning" / "datasources" / "prometheus.yml").read_text())["datasources"]
    asked = {"type": source["type"], "uid": source["uid"]}
    holders = [*panels, *(target for panel in panels for target in panel["targets"])]
    holders += [*dashboard["templating"]["list"], *dashboard["annotations"]["list"]]
    assert all(holder["datasource"] == asked for holder in holders)


def test_compose_puts_it_where_grafana_looks(root: Path, folder: Path) -> None:
    services = yaml.safe_load((root / "docker-compose.yml").read_text())["services"]
    mounts = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"])
    [provider] = yaml.safe_load((folder / "provisioning" / "dashboards" / "fewstep.yml").read_text())["providers"]
    assert mounts["./deploy/grafana/dashboards"] == provider["options"]["path"]
    assert mounts["./deploy/grafana/provisioning"] == "/etc/grafana/provisioning"
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/fewstep.json"
    [source] = yaml.safe_load((folder / "provisioning" / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["url"].removeprefix("http://").split(":")[0] in services
