"""Alert rules and dashboard: their metrics are ours, their PromQL parses, and alerts fire when they should."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.reporting.metrics import METRICS

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "docs/deploy"
RULES = yaml.safe_load((DEPLOY / "prometheus-rules.yaml").read_text())["groups"][0]["rules"]
DASHBOARD = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
SERIES = {
    *(name for name, metric in METRICS.items() if metric.kind != "histogram"),
    *(name + end for name, metric in METRICS.items() if metric.kind == "histogram" for end in ("_bucket", "_count")),
}

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian and Ubuntu: apt install prometheus)"
)


def named(expression: str) -> set[str]:
    return set(re.findall(r"\bdorfman_\w+", expression))


def expressions() -> list[str]:
    return [target["expr"] for panel in PANELS for target in panel["targets"]]


def promtool(*arguments: str, cwd: Path = ROOT) -> None:
    done = subprocess.run(["promtool", *arguments], cwd=cwd, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_name_metrics_and_labels_that_are_there():
    assert {rule["alert"] for rule in RULES} == {
        "DorfmanNoRunComplete", "DorfmanRunStalled", "DorfmanNothingMoves", "DorfmanErrorRate", "DorfmanSuspect",
        "DorfmanCostUp",
    }  # fmt: skip
    for rule in RULES:
        assert named(rule["expr"]) and named(rule["expr"]) <= SERIES, rule["alert"]
        labels = {label for name in named(rule["expr"]) for label in METRICS[name].labels}
        grouped = re.findall(r"(?:by|on) \(([^)]*)\)", rule["expr"])
        assert {label.strip() for group in grouped for label in group.split(",")} <= labels, rule["alert"]
        assert set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"])) <= labels


def test_the_dashboard_shows_every_metric_and_no_other():
    shown = {name for expression in expressions() for name in named(expression)}
    assert shown <= SERIES
    assert {name.removesuffix("_bucket") for name in shown} == set(METRICS)


def test_the_dashboard_is_one_that_grafana_can_place():
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    assert set(re.findall(r"\$\{?([a-z]\w*)", json.dumps(PANELS))) <= variables
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                 for y in range(place["y"], place["y"] + place["h"])}  # fmt: skip
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells


def test_the_scrape_configuration_names_metrics_as_the_rules_do():
    content = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    rename, drop = content["scrape_configs"][0]["metric_relabel_configs"]
    for name in SERIES:
        assert re.fullmatch(rename["regex"], f"ray_{name}")[1] == name
    assert not {label for metric in METRICS.values() for label in metric.labels if re.fullmatch(drop["regex"], label)}


@needs_promtool
def test_promtool_takes_the_rules_the_panels_and_the_configuration(tmp_path):
    promtool("check", "rules", "docs/deploy/prometheus-rules.yaml")
    promtool("check", "config", "--syntax-only", "docs/deploy/prometheus.yml")
    rules: list[dict[str, Any]] = [
        {"record": f"panel:{number}", "expr": re.sub(r"\$__\w+", "5m", expression)}
        for number, expression in enumerate(expressions())
    ]
    (tmp_path / "panels.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("check", "rules", str(tmp_path / "panels.yaml"))


@needs_promtool
def test_alerts_fire_when_they_should_and_not_before():
    promtool("test", "rules", "rules-test.yaml", cwd=ROOT / "tests/alerts")
