"""Grafana's dashboards as code: `python -m trainyard.deploy.dashboards FOLDER` writes them.

`k8s/monitoring/dashboards` has what this makes; a test compares the two, and looks up every metric
name that a panel asks for.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

SCHEMA_VERSION = 39
"""Of Grafana 10.4 and newer, which migrates it by itself."""

COLUMNS = 24
"""Width of Grafana's grid."""

_CHANNEL = 'environment=~"$environment", model=~"$model"'
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}

Kind = Literal["timeseries", "stat", "table", "state-timeline"]


@dataclass(frozen=True)
class Query:
    """One PromQL expression of a panel."""

    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    """One panel."""

    title: str
    queries: tuple[Query, ...]
    kind: Kind = "timeseries"
    unit: str = "short"
    """One of Grafana's unit ids."""
    description: str = ""
    width: int = 8
    height: int = 8

    def to_json(self, number: int, x: int, y: int) -> dict[str, Any]:
        """Return the panel at a place of the grid."""
        table = self.kind == "table"
        return {
            "id": number,
            "type": self.kind,
            "title": self.title,
            "description": self.description,
            "datasource": _SOURCE,
            "gridPos": {"h": self.height, "w": self.width, "x": x, "y": y},
            "fieldConfig": {"defaults": {"unit": self.unit}, "overrides": []},
            "options": {},
            "targets": [
                {
                    "refId": chr(ord("A") + index),
                    "datasource": _SOURCE,
                    "expr": query.expr,
                    "legendFormat": query.legend,
                    "instant": table,
                    "range": not table,
                    "format": "table" if table else "time_series",
                }
                for index, query in enumerate(self.queries)
            ],
        }


@dataclass(frozen=True)
class Row:
    """Panels under a heading."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Dashboard:
    """One dashboard."""

    uid: str
    title: str
    description: str
    rows: tuple[Row, ...]
    variables: tuple[tuple[str, str], ...] = field(default=())
    """Name and the metric whose label of that name gives the choices."""

    def to_json(self) -> dict[str, Any]:
        """Return what Grafana reads."""
        return {
            "uid": self.uid,
            "title": self.title,
            "description": self.description,
            "tags": ["trainyard"],
            "schemaVersion": SCHEMA_VERSION,
            "version": 1,
            "editable": False,
            "refresh": "15s",
            "time": {"from": "now-3h", "to": "now"},
            "timezone": "utc",
            "templating": {"list": [_data_source(), *map(_variable, self.variables)]},
            "annotations": {"list": [_endings()]},
            "panels": _laid_out(self.rows),
        }


def _data_source() -> dict[str, Any]:
    return {"name": "datasource", "label": "Data source", "type": "datasource",
            "query": "prometheus"}  # fmt: skip


def _variable(variable: tuple[str, str]) -> dict[str, Any]:
    name, metric = variable
    return {
        "name": name,
        "label": name.capitalize(),
        "type": "query",
        "datasource": _SOURCE,
        # As text: Grafana's schema of dashboards knows no object here that holds text.
        "query": f"label_values({metric}, {name})",
        "refresh": 2,
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": {"text": "All", "value": "$__all"},
    }


def _endings() -> dict[str, Any]:
    """Return the marks of when rollouts ended."""
    return {
        "name": "Ends of rollouts",
        "datasource": _SOURCE,
        "enable": True,
        "expr": "changes(trainyard_channel_last_event_timestamp_seconds{"
        f'{_CHANNEL}, event=~"promoted|returned|rolled_back|withdrawn"}}[1m]) > 0',
        "titleFormat": "{{model}} in {{environment}}: {{event}}",
        "iconColor": "blue",
    }


def _laid_out(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return rows and panels from left to right, from top to bottom."""
    found: list[dict[str, Any]] = []
    y = 0
    for row in rows:
        found.append(
            {
                "id": len(found) + 1,
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "gridPos": {"h": 1, "w": COLUMNS, "x": 0, "y": y},
                "panels": [],
            }
        )
        y, x, highest = y + 1, 0, 0
        for panel in row.panels:
            if x + panel.width > COLUMNS:
                y, x, highest = y + highest, 0, 0
            found.append(panel.to_json(len(found) + 1, x, y))
            x, highest = x + panel.width, max(highest, panel.height)
        y += highest
    return found


def _quantile(share: float, histogram: str, by: str) -> str:
    return (
        f"histogram_quantile({share}, sum by (le, {by}) "
        f"(rate({histogram}_bucket{{{_CHANNEL}}}[$__rate_interval])))"
    )


def _quantiles(histogram: str, by: str = "release") -> tuple[Query, ...]:
    return tuple(
        Query(_quantile(share, histogram, by), f"{name} {{{{{by}}}}}")
        for share, name in ((0.5, "p50"), (0.9, "p90"), (0.99, "p99"))
    )


def _of_channel(metric: str, *more: str) -> str:
    return f"{metric}{{{', '.join((_CHANNEL, *more))}}}"


def _rate(metric: str, by: str, *more: str) -> str:
    return f"sum by ({by}) (rate({_of_channel(metric, *more)}[$__rate_interval]))"


ROLLOUTS = Dashboard(
    uid="trainyard-rollouts",
    title="Trainyard: rollouts",
    description="What each channel serves, what its rollout does, and both releases side by side.",
    variables=(
        ("environment", "trainyard_channel_generation"),
        ("model", "trainyard_channel_generation"),
    ),
    rows=(
        Row(
            "Channels",
            (
                Panel(
                    "Releases by role",
                    (Query(_of_channel("trainyard_channel_release_info")),),
                    "table",
                ),
                Panel(
                    "Phase",
                    (
                        Query(
                            f"{_of_channel('trainyard_channel_phase')} == 1",
                            "{{environment}}/{{model}}: {{phase}}",
                        ),
                    ),
                    "state-timeline",
                ),
                Panel(
                    "Weights",
                    (
                        Query(
                            _of_channel("trainyard_channel_weight_percent"),
                            "wished: {{environment}}/{{model}} {{track}}",
                        ),
                        Query(
                            _of_channel("trainyard_proxy_weight_percent"),
                            "in effect: {{release}}",
                        ),
                        Query(
                            f"max by (environment, model, release) "
                            f"({_of_channel('trainyard_guard_weight_percent')})",
                            "decided: {{release}}",
                        ),
                    ),
                    unit="percent",
                    description="In effect is the proxy's; decided is that of a cluster's guard.",
                ),
                Panel(
                    "Guard",
                    (
                        Query(
                            f"{_of_channel('trainyard_proxy_guard_state')} == 1",
                            "{{environment}}/{{model}}: {{state}}",
                        ),
                        Query(
                            "max by (environment, model, state) "
                            f"({_of_channel('trainyard_guard_state')}) == 1",
                            "{{environment}}/{{model}}: {{state}}",
                        ),
                    ),
                    "state-timeline",
                ),
                Panel(
                    "Age of the driver's lease",
                    (
                        Query(_of_channel("trainyard_proxy_lease_age_seconds"), "{{model}}"),
                        Query(
                            "max by (environment, model) "
                            f"({_of_channel('trainyard_guard_lease_age_seconds')})",
                            "{{model}}",
                        ),
                        Query(_of_channel("trainyard_rollout_lease_seconds"), "runs out"),
                    ),
                    unit="s",
                ),
                Panel(
                    "Ends of rollouts in the channel's history",
                    (
                        Query(
                            _of_channel("trainyard_rollouts_ended"),
                            "{{environment}}/{{model}} {{outcome}}",
                        ),
                    ),
                    "stat",
                ),
            ),
        ),
        Row(
            "Both releases side by side",
            (
                Panel(
                    "Requests",
                    (
                        Query(_rate("trainyard_proxy_requests_total", "release"), "{{release}}"),
                        Query(_rate("vllm:request_success_total", "release"), "vLLM: {{release}}"),
                    ),
                    unit="reqps",
                ),
                Panel(
                    "Failed requests",
                    (
                        Query(
                            _rate(
                                "trainyard_proxy_requests_total",
                                "release, outcome",
                                'outcome!="ok"',
                            ),
                            "{{release}} {{outcome}}",
                        ),
                    ),
                    unit="reqps",
                ),
                Panel(
                    "Waiting requests",
                    (
                        Query(
                            f"sum by (release) ({_of_channel('vllm:num_requests_waiting')})",
                            "{{release}}",
                        ),
                    ),
                ),
                Panel(
                    "Time to first token",
                    _quantiles("vllm:time_to_first_token_seconds"),
                    unit="s",
                ),
                Panel(
                    "Time per output token",
                    _quantiles("vllm:request_time_per_output_token_seconds"),
                    unit="s",
                ),
                Panel(
                    "Time to first token, as clients see it",
                    _quantiles("trainyard_proxy_time_to_first_token_seconds"),
                    unit="s",
                ),
            ),
        ),
        Row(
            "What the judge says",
            (
                Panel(
                    "Evidence (1 decides)",
                    (
                        Query(
                            _of_channel("trainyard_rollout_evidence_ratio"),
                            "{{model}} {{metric}} {{direction}}",
                        ),
                    ),
                ),
                Panel(
                    "Candidate over stable",
                    (Query(_of_channel("trainyard_rollout_metric_ratio"), "{{model}} {{metric}}"),),
                ),
                Panel(
                    "Verdict",
                    (
                        Query(
                            f"{_of_channel('trainyard_rollout_verdict')} == 1",
                            "{{model}}: {{outcome}}",
                        ),
                    ),
                    "state-timeline",
                ),
                Panel(
                    "Exposed requests and looks",
                    (
                        Query(
                            _of_channel("trainyard_rollout_exposed_requests"),
                            "{{model}} requests",
                        ),
                        Query(_of_channel("trainyard_rollout_looks"), "{{model}} looks"),
                    ),
                ),
                Panel(
                    "Device-hours in this time range",
                    (
                        Query(
                            "sum by (environment, model, track) (sum_over_time("
                            + _of_channel("trainyard_channel_servers", 'kind="ready"')
                            + "[$__range:1m])) / 60",
                            "{{environment}}/{{model}} {{track}}",
                        ),
                    ),
                    "stat",
                    unit="h",
                    description="Hours of ready servers during rollouts. A server takes one of the "
                    "environment's `devices`: multiply by what one costs.",
                ),
                Panel(
                    "Last rollback",
                    (
                        Query(
                            _of_channel("trainyard_rollback_seconds"), "{{environment}}/{{model}}"
                        ),
                    ),
                    "stat",
                    unit="s",
                ),
            ),
        ),
        Row(
            "Releases and their steps",
            (
                Panel(
                    "Steps by state",
                    (
                        Query(
                            'sum by (step, state) (trainyard_steps{model=~"$model"})',
                            "{{step}} {{state}}",
                        ),
                    ),
                ),
                Panel(
                    "Gates",
                    (
                        Query(
                            'sum by (gate, outcome) (trainyard_gate_verdicts{model=~"$model"})',
                            "{{gate}} {{outcome}}",
                        ),
                    ),
                    "stat",
                ),
                Panel(
                    "Bundles found (hit) and made (miss)",
                    (
                        Query(
                            'sum by (result) (trainyard_bundle_lookups{model=~"$model"})',
                            "{{result}}",
                        ),
                    ),
                    "stat",
                ),
                Panel(
                    "Last compile",
                    (
                        Query('trainyard_compile_seconds{model=~"$model"}', "{{model}} {{target}}"),
                        Query(
                            'trainyard_step_seconds{model=~"$model"}',
                            "{{model}} {{target}} whole {{step}}",
                        ),
                    ),
                    unit="s",
                ),
                Panel(
                    "Peak memory of the last compile",
                    (
                        Query(
                            'trainyard_compile_peak_memory_bytes{model=~"$model"}',
                            "{{model}} {{target}}",
                        ),
                    ),
                    unit="bytes",
                ),
                Panel(
                    "Brought into the store",
                    (Query('trainyard_moved_bytes{model=~"$model"}', "{{model}} {{step}}"),),
                    unit="bytes",
                ),
            ),
        ),
    ),
)

_NEURON = 'runtime_tag=~"$release"'

SERVING = Dashboard(
    uid="trainyard-serving",
    title="Trainyard: serving",
    description="vLLM's servers by release, the Neuron devices under them, and Airflow.",
    variables=(
        ("environment", "vllm:num_requests_running"),
        ("model", "vllm:num_requests_running"),
        ("release", "vllm:num_requests_running"),
    ),
    rows=(
        Row(
            "vLLM",
            (
                Panel(
                    "Requests running and waiting",
                    tuple(
                        Query(
                            f"sum by (release) ({_of_channel(f'vllm:num_requests_{state}')})",
                            f"{{{{release}}}} {state}",
                        )
                        for state in ("running", "waiting")
                    ),
                ),
                Panel(
                    "KV cache in use",
                    (Query(_of_channel("vllm:kv_cache_usage_perc"), "{{pod}}"),),
                    unit="percentunit",
                ),
                Panel(
                    "Preemptions",
                    (Query(_rate("vllm:num_preemptions_total", "release"), "{{release}}"),),
                    unit="ops",
                ),
                Panel(
                    "Tokens",
                    (
                        Query(_rate("vllm:prompt_tokens_total", "release"), "in {{release}}"),
                        Query(_rate("vllm:generation_tokens_total", "release"), "out {{release}}"),
                    ),
                    unit="ops",
                ),
                Panel(
                    "Prefix cache hits",
                    (
                        Query(
                            _rate("vllm:prefix_cache_hits_total", "release")
                            + " / "
                            + _rate("vllm:prefix_cache_queries_total", "release"),
                            "{{release}}",
                        ),
                    ),
                    unit="percentunit",
                ),
                Panel(
                    "Ends of requests",
                    (
                        Query(
                            _rate("vllm:request_success_total", "release, finished_reason"),
                            "{{release}} {{finished_reason}}",
                        ),
                    ),
                    unit="reqps",
                ),
                Panel(
                    "Time to first token",
                    _quantiles("vllm:time_to_first_token_seconds"),
                    unit="s",
                ),
                Panel(
                    "Between two tokens",
                    _quantiles("vllm:inter_token_latency_seconds"),
                    unit="s",
                ),
                Panel(
                    "Whole requests",
                    _quantiles("vllm:e2e_request_latency_seconds"),
                    unit="s",
                ),
                Panel(
                    "In the queue",
                    _quantiles("vllm:request_queue_time_seconds"),
                    unit="s",
                ),
                Panel(
                    "Prefill and decode, average",
                    tuple(
                        Query(
                            _rate(f"vllm:request_{part}_time_seconds_sum", "release")
                            + " / "
                            + _rate(f"vllm:request_{part}_time_seconds_count", "release"),
                            f"{part} {{{{release}}}}",
                        )
                        for part in ("prefill", "decode")
                    ),
                    unit="s",
                ),
                Panel(
                    "Servers that answer a scrape",
                    (
                        Query(
                            f"count by (release) ({_of_channel('vllm:num_requests_running')})",
                            "{{release}}",
                        ),
                    ),
                    "stat",
                ),
            ),
        ),
        Row(
            "Neuron devices (neuron-monitor)",
            (
                Panel(
                    "Cores in use",
                    (
                        Query(
                            "avg by (instance_id, runtime_tag) "
                            f"(neuroncore_utilization_ratio{{{_NEURON}}})",
                            "{{instance_id}} {{runtime_tag}}",
                        ),
                    ),
                    unit="percentunit",
                    description="Absent while no runtime runs on the device.",
                ),
                Panel(
                    "Memory",
                    (
                        Query(
                            "sum by (runtime_tag, memory_location) "
                            f"(neuron_runtime_memory_used_bytes{{{_NEURON}}})",
                            "{{runtime_tag}} {{memory_location}}",
                        ),
                    ),
                    unit="bytes",
                ),
                Panel(
                    "Latency of one execution",
                    (
                        Query(
                            "max by (runtime_tag, percentile) (execution_latency_seconds{"
                            f'{_NEURON}, percentile=~"p50|p99"}})',
                            "{{runtime_tag}} {{percentile}}",
                        ),
                    ),
                    unit="s",
                    description="Of one NEFF, as the runtime reports it; no histogram.",
                ),
                Panel(
                    "Execution errors",
                    (
                        Query(
                            "sum by (runtime_tag, error_type) "
                            f"(increase(execution_errors_total{{{_NEURON}}}[5m]))",
                            "{{runtime_tag}} {{error_type}}",
                        ),
                    ),
                ),
                Panel(
                    "Memory errors",
                    (
                        Query(
                            "sum by (instance_id, neuron_device_index, event_type) "
                            "(increase(hardware_ecc_events_total[1h]))",
                            "{{instance_id}} {{neuron_device_index}} {{event_type}}",
                        ),
                    ),
                    description="More than none means something; the number does not.",
                ),
                Panel(
                    "The machine",
                    (
                        Query(
                            "system_memory_used_bytes / system_memory_total_bytes",
                            "{{instance_id}} memory",
                        ),
                    ),
                    unit="percentunit",
                ),
            ),
        ),
        Row(
            "Airflow (OpenTelemetry)",
            (
                Panel(
                    "Pools",
                    tuple(
                        Query(f"airflow_pool_{state}_slots", f"{{{{pool_name}}}} {state}")
                        for state in ("running", "deferred", "queued", "open")
                    ),
                ),
                Panel(
                    "Executor",
                    (
                        Query("airflow_executor_running_tasks", "running"),
                        Query("airflow_executor_queued_tasks", "queued"),
                        Query("airflow_scheduler_dagruns_running", "runs"),
                    ),
                ),
                Panel(
                    "DAG files and triggers",
                    (
                        Query("airflow_dag_processing_import_errors", "import errors"),
                        Query("airflow_triggers_running", "triggers on {{hostname}}"),
                    ),
                ),
            ),
        ),
    ),
)

DASHBOARDS = (ROLLOUTS, SERVING)


def write(folder: Path) -> None:
    """Write every dashboard as `<uid>.json` into a folder."""
    for dashboard in DASHBOARDS:
        text = json.dumps(dashboard.to_json(), indent=2, ensure_ascii=False)
        (folder / f"{dashboard.uid}.json").write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
