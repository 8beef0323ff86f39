"""Dashboards, alerts and Prometheus' configuration ask for what the exporters really have."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from tests.unit.deploy.promql import metric_names

from trainyard.deploy.dashboards import COLUMNS, DASHBOARDS, write
from trainyard.metrics.families import FAMILIES
from trainyard.rollout.readers.families import families, series_names
from trainyard.serving.kubernetes.guard_metrics import GuardMetrics
from trainyard.serving.proxy_metrics import ProxyMetrics

REPOSITORY = Path(__file__).parents[3]
MONITORING = REPOSITORY / "k8s" / "monitoring"
RULES = MONITORING / "rules" / "trainyard.yml"
RECORDED = Path(__file__).parent / "pages" / "vllm.txt"


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def alerts() -> list[dict[str, Any]]:
    return [rule for group in load(RULES)["groups"] for rule in group["rules"]]


def dashboards() -> dict[str, dict[str, Any]]:
    return {
        path.stem: json.loads(path.read_text())
        for path in sorted((MONITORING / "dashboards").glob("*.json"))
    }


def expressions(dashboard: dict[str, Any]) -> Iterator[str]:
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    yield from (each["expr"] for each in dashboard["annotations"]["list"])
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"].removeprefix("label_values(").split(",")[0]


@cache
def known() -> frozenset[str]:
    """Names of series: of our own exporters as they are, of others as recorded or listed."""
    names = set(FAMILIES)
    own = (ProxyMetrics().text([]), GuardMetrics().text())
    for page in (*(text.decode() for text in own), RECORDED.read_text()):
        for family in text_string_to_metric_families(page):
            names.update(_series(family))
    for listed in (MONITORING / "names").glob("*.txt"):
        lines = listed.read_text().splitlines()
        names.update(line for line in lines if line and not line.startswith("#"))
    return frozenset(names)


def _series(family: Any) -> set[str]:
    """The series of a family, also of one that has no sample yet."""
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    of_type = {f"{family.name}{suffix}" for suffix in suffixes.get(family.type, ("",))}
    return of_type | {sample.name for sample in family.samples}


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        ("sum by (a, b) (rate(x_total{a=~\"y|z\"}[5m])) / 2", {"x_total"}),
        ('max({__name__=~"one|two", c="d"}) > on (e) three / 2', {"one", "two", "three"}),
        ("time() - x > 300 or absent(x)", {"x"}),
        ("histogram_quantile(0.5, sum by (le) (rate(vllm:y_bucket[$__rate_interval])))",
         {"vllm:y_bucket"}),
        ("a unless on (b) c and d == 1e3", {"a", "c", "d"}),
    ],
)  # fmt: skip
def test_names_are_found_in_expressions(expression: str, names: set[str]) -> None:
    assert metric_names(expression) == names


@pytest.mark.parametrize("uid", [dashboard.uid for dashboard in DASHBOARDS])
def test_every_metric_of_a_dashboard_exists(uid: str) -> None:
    asked = {name for each in expressions(dashboards()[uid]) for name in metric_names(each)}

    assert len(asked) > 15
    assert asked <= known(), asked - known()


def test_every_metric_of_an_alert_exists() -> None:
    asked = {name for rule in alerts() for name in metric_names(rule["expr"])}

    assert asked <= known(), asked - known()


def test_every_metric_of_the_autoscalers_exists() -> None:
    template = (REPOSITORY / "k8s" / "templates" / "scaledobject.yaml").read_text()
    asked = {
        name
        for line in template.splitlines()
        if "query: " in line
        for name in metric_names(line.split("query: ")[1])
    }

    assert asked
    assert asked <= known()


def test_every_metric_that_the_judge_reads_exists() -> None:
    asked = set(series_names(families("0.32.0")))

    assert len(asked) > 5
    assert asked <= known(), asked - known()


def test_what_our_exporter_tells_is_on_a_dashboard_or_in_an_alert() -> None:
    asked = {name for page in dashboards().values() for each in expressions(page)
             for name in metric_names(each)}  # fmt: skip
    asked |= {name for rule in alerts() for name in metric_names(rule["expr"])}
    for_people = {
        "trainyard_channel_rejected_releases",
        "trainyard_releases",
        "trainyard_release_last_published_timestamp_seconds",
        "trainyard_rollout_guard_events",
        "trainyard_rollout_in_progress",
        "trainyard_rollout_number",
        "trainyard_rollout_started_timestamp_seconds",
        "trainyard_step_failures",
    }

    assert set(FAMILIES) - asked == for_people


# --- dashboards -----------------------------------------------------------------------------------

_TEXT: dict[str, Any] = {"type": "string", "minLength": 1}
_SOURCE = {
    "type": "object",
    "properties": {"type": {"const": "prometheus"}, "uid": {"const": "${datasource}"}},
    "required": ["type", "uid"],
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["uid", "title", "schemaVersion", "panels", "templating", "time", "refresh"],
    "properties": {
        "uid": {"type": "string", "pattern": r"^[a-zA-Z0-9_-]{1,40}$"},
        "title": _TEXT,
        "schemaVersion": {"type": "integer", "minimum": 36},
        "panels": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["id", "type", "title", "gridPos"],
                "properties": {
                    "id": {"type": "integer", "minimum": 1},
                    "type": {"enum": ["row", "timeseries", "stat", "table", "state-timeline"]},
                    "title": _TEXT,
                    "gridPos": {
                        "type": "object",
                        "required": ["h", "w", "x", "y"],
                        "additionalProperties": {"type": "integer", "minimum": 0},
                    },
                    "datasource": _SOURCE,
                    "targets": {
                        "type": "array",
                        "minItems": 1,
                        "items": {
                            "type": "object",
                            "required": ["refId", "expr", "datasource"],
                            "properties": {"expr": _TEXT, "datasource": _SOURCE},
                        },
                    },
                },
                "if": {"properties": {"type": {"not": {"const": "row"}}}},
                "then": {"required": ["targets", "datasource", "fieldConfig"]},
            },
        },
    },
}


def test_dashboards_are_what_the_code_makes(tmp_path: Path) -> None:
    write(tmp_path)

    made = {path.stem: path.read_text() for path in tmp_path.glob("*.json")}
    stored = {path.stem: path.read_text() for path in (MONITORING / "dashboards").glob("*.json")}
    assert made == stored, "python -m trainyard.deploy.dashboards k8s/monitoring/dashboards"


@pytest.mark.parametrize("uid", [dashboard.uid for dashboard in DASHBOARDS])
def test_a_dashboard_has_the_form_that_grafana_loads(uid: str) -> None:
    dashboard = dashboards()[uid]
    jsonschema.validate(dashboard, SCHEMA)
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= COLUMNS
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                 for y in range(place["y"], place["y"] + place["h"])}  # fmt: skip
        assert not cells & taken, panel["title"]
        taken |= cells
        references = [target["refId"] for target in panel.get("targets", ())]
        assert len(set(references)) == len(references)


@pytest.mark.parametrize("uid", [dashboard.uid for dashboard in DASHBOARDS])
def test_a_dashboard_uses_each_of_its_variables_and_no_other(uid: str) -> None:
    dashboard = dashboards()[uid]
    declared = {variable["name"] for variable in dashboard["templating"]["list"]}
    text = " ".join(expressions(dashboard)) + " ${datasource}"
    used = set(re.findall(r"\$\{?(\w+)", text))

    assert used - {"__rate_interval", "__range"} == declared


# --- alerts ---------------------------------------------------------------------------------------


def test_every_alert_says_how_bad_it_is_and_has_a_runbook() -> None:
    page = (REPOSITORY / "docs" / "operations.md").read_text()
    for rule in alerts():
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert rule["annotations"]["summary"].endswith((".", "blind."))
        url = rule["annotations"]["runbook_url"]
        assert url == f"docs/operations.md#{rule['alert'].lower()}"
        assert f"### {rule['alert']}\n" in page, rule["alert"]


def test_every_runbook_has_its_alert() -> None:
    page = (REPOSITORY / "docs" / "operations.md").read_text()
    section = page.split("\n## What every alert means\n")[1].split("\n## ")[0]

    assert re.findall(r"^### (\w+)$", section, re.MULTILINE) == [r["alert"] for r in alerts()]


def test_every_alert_is_seen_to_fire_in_the_tests_of_the_rules() -> None:
    tests = load(RULES.with_name("trainyard.test.yml"))["tests"]
    fired = {
        test["alertname"] for each in tests for test in each["alert_rule_test"]
        if test["exp_alerts"]
    }  # fmt: skip

    assert fired == {rule["alert"] for rule in alerts()}


def test_the_operators_rules_are_the_same() -> None:
    rule = load(REPOSITORY / "k8s" / "components" / "monitoring" / "rules.yaml")

    assert rule["kind"] == "PrometheusRule"
    assert rule["spec"] == load(RULES)


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "rules", "rules/trainyard.yml"),
        ("check", "config", "prometheus.yml"),
        ("check", "config", "amp/prometheus.yml"),
        ("test", "rules", "rules/trainyard.test.yml"),
    ],
    ids=" ".join,
)
def test_promtool_accepts(arguments: tuple[str, ...]) -> None:
    program = shutil.which("promtool")
    assert program, "Debian's package prometheus is not installed: see .ci/system-packages"
    done = subprocess.run(
        [program, *arguments], cwd=MONITORING, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout + done.stderr


# --- AWS's own ------------------------------------------------------------------------------------


def test_amazon_managed_prometheus_gets_everything_signed() -> None:
    config = load(MONITORING / "amp" / "prometheus.yml")
    (remote,) = config["remote_write"]

    assert remote["sigv4"]["region"]
    assert remote["url"].endswith("/api/v1/remote_write")
    # The rules live in the workspace, which evaluates them itself.
    assert "rule_files" not in config


def test_cloudwatch_gets_the_series_that_its_alarms_watch() -> None:
    agent = json.loads((MONITORING / "cloudwatch" / "agent.json").read_text())
    declarations = agent["logs"]["metrics_collected"]["prometheus"]["emf_processor"]
    sent = [
        re.compile(selector)
        for each in declarations["metric_declaration"]
        for selector in each["metric_selectors"]
    ]
    alarms = load(MONITORING / "cloudwatch" / "alarms.yaml")["Resources"]
    watched = {
        each["MetricStat"]["Metric"]["MetricName"]
        for alarm in alarms.values()
        for each in alarm["Properties"]["Metrics"]
        if "MetricStat" in each
    }

    assert watched
    assert watched <= known()
    for name in watched:
        assert any(selector.fullmatch(name) for selector in sent), name
    for alarm in alarms.values():
        # No figures are no good news.
        assert alarm["Properties"]["TreatMissingData"] in {"breaching", "notBreaching"}
        assert alarm["Properties"]["AlarmDescription"].split()[-1].startswith("docs/operations.md#")
