"""What Prometheus and Grafana are given: checked with Prometheus' own tool and Grafana's types."""

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
    """What it says; skipped where it is not installed."""
    program = shutil.which("promtool")
    if program is None:
        unavailable("no promtool: apt-get install prometheus")
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


@pytest.mark.integration
def test_prometheus_reads_its_configuration_and_the_alerts_in_it() -> None:
    said = promtool("check", "config", PROMETHEUS / "prometheus.yml")

    assert said.returncode == 0, said.stdout + said.stderr
    assert "3 rules found" in said.stdout


@pytest.mark.integration
def test_alerts_speak_when_they_should_and_not_before() -> None:
    said = promtool("test", "rules", Path(__file__).with_name("alerts.yaml"))

    assert said.returncode == 0, said.stdout + said.stderr


@pytest.mark.integration
def test_an_alert_that_speaks_too_early_would_be_seen(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).with_name("alerts.yaml"), tmp_path)
    hasty = (PROMETHEUS / "alerts.yml").read_text().replace("for: 5m", "for: 1m")
    (tmp_path / "alerts.yml").write_text(hasty)
    tests = (tmp_path / "alerts.yaml").read_text()
    (tmp_path / "alerts.yaml").write_text(tests.replace("../../deploy/prometheus/", ""))

    assert promtool("test", "rules", tmp_path / "alerts.yaml").returncode == 1


def test_every_alert_says_what_to_do() -> None:
    [group] = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]

    for rule in group["rules"]:
        assert set(rule["annotations"]) == {"summary", "what_to_do"}
        assert rule["labels"]["severity"] in ("critical", "warning")


def test_the_dashboard_is_what_its_source_says() -> None:
    made = runpy.run_path(str(GRAFANA / "dashboard.py"))

    assert DASHBOARD.read_text() == made["text"](), "run deploy/grafana/dashboard.py"


def test_the_dashboards_panels_lie_beside_each_other_without_gaps() -> None:
    taken = [
        (x, y)
        for panel in panels()
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]

    assert len(taken) == len(set(taken))
    assert len(taken) == 24 * (1 + max(y for _, y in taken))


def test_every_panel_has_a_sentence_and_asks_the_provisioned_prometheus() -> None:
    read = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yaml").read_text())
    [source] = read["datasources"]
    charts = [panel for panel in panels() if panel["type"] != "row"]

    for panel in charts:
        assert panel["description"].endswith(".")
        assert panel["targets"]
        for asked in (panel, *panel["targets"]):
            assert asked["datasource"] == {"type": source["type"], "uid": source["uid"]}
