"""The files for Prometheus and Grafana, checked by promtool and by Grafana's types."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.requirements import unavailable
from tests.support.units import DEPLOY

PROMETHEUS = DEPLOY / "prometheus"
GRAFANA = DEPLOY / "grafana"
DASHBOARD = GRAFANA / "dashboards" / "twolane.json"


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A run of promtool; skips the test where it is not installed."""
    program = shutil.which("promtool")
    if program is None:
        unavailable("no promtool: apt-get install prometheus")
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)


def panels() -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return entries


@pytest.mark.integration
def test_prometheus_reads_its_configuration_and_the_alerts_in_it() -> None:
    result = promtool("check", "config", PROMETHEUS / "prometheus.yml")

    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 rules found" in result.stdout


@pytest.mark.integration
def test_alerts_fire_when_they_should_and_not_before() -> None:
    result = promtool("test", "rules", Path(__file__).with_name("alerts.yaml"))

    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.integration
def test_an_alert_that_fires_too_early_fails_the_rule_tests(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).with_name("alerts.yaml"), tmp_path)
    early = (PROMETHEUS / "alerts.yml").read_text().replace("for: 5m", "for: 1m")
    (tmp_path / "alerts.yml").write_text(early)
    tests = (tmp_path / "alerts.yaml").read_text()
    (tmp_path / "alerts.yaml").write_text(tests.replace("../../deploy/prometheus/", ""))

    assert promtool("test", "rules", tmp_path / "alerts.yaml").returncode == 1


def test_every_alert_says_what_to_do() -> None:
    [group] = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]

    for rule in group["rules"]:
        assert set(rule["annotations"]) == {"summary", "what_to_do"}
        assert rule["labels"]["severity"] in ("critical", "warning")


def test_the_dashboard_file_is_what_its_source_builds() -> None:
    source = runpy.run_path(str(GRAFANA / "dashboard.py"))

    assert DASHBOARD.read_text() == source["text"](), "run deploy/grafana/dashboard.py"


def test_the_panels_of_the_dashboard_neither_overlap_nor_leave_gaps() -> None:
    cells = [
        (x, y)
        for panel in panels()
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]

    assert len(cells) == len(set(cells))
    assert len(cells) == 24 * (1 + max(y for _, y in cells))


def test_every_panel_has_a_description_and_queries_the_provisioned_prometheus() -> None:
    provisioned = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yaml").read_text())
    [source] = provisioned["datasources"]
    charts = [panel for panel in panels() if panel["type"] != "row"]

    for panel in charts:
        assert panel["description"].endswith(".")
        assert panel["targets"]
        for target in (panel, *panel["targets"]):
            assert target["datasource"] == {"type": source["type"], "uid": source["uid"]}
