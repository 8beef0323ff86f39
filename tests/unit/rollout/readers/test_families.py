"""Which series mean what, by version of vLLM."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.unit.rollout.machine import NEW, NOW

from trainyard.documents.look import PodCounters
from trainyard.rollout.readers.counters import Sample, pod_counters
from trainyard.rollout.readers.families import FAMILIES, families, series_names
from trainyard.serving.protocol import ServerStatus

PAGE = Path(__file__).parents[4] / "docs" / "metrics.md"
SERVER = ServerStatus(f"{NEW}-0", NEW, "ready", "", NOW, 0, "")


def names(version: str | None, figure: str) -> list[str]:
    return [family.name for family in families(version) if family.figure == figure]


@pytest.mark.parametrize(
    ("version", "tpot", "events", "queries"),
    [
        ("0.9.2", [], ["vllm:time_per_output_token_seconds"], ["gpu_prefix"]),
        ("0.10.2", [], ["vllm:time_per_output_token_seconds"], ["prefix", "gpu_prefix"]),
        ("0.11.0", ["request"], ["inter", "vllm:time_per"], ["prefix", "gpu_prefix"]),
        ("0.12.0", ["request"], ["inter", "vllm:time_per"], ["prefix"]),
        ("0.13.0+neuron", ["request"], ["inter"], ["prefix"]),
        ("0.32.0", ["request"], ["inter"], ["prefix"]),
    ],
)
def test_every_version_has_its_own(
    version: str, tpot: list[str], events: list[str], queries: list[str]
) -> None:
    for figure, wanted in (("tpot", tpot), ("events", events), ("prefix_queries", queries)):
        found = names(version, figure)
        assert len(found) == len(wanted)
        for name, part in zip(found, wanted, strict=True):
            assert part.removeprefix("vllm:") in name
    assert names(version, "ttft") == ["vllm:time_to_first_token_seconds"]


@pytest.mark.parametrize("version", [None, "", "dev"])
def test_servers_of_unknown_version_may_have_any(version: str | None) -> None:
    assert families(version) == FAMILIES


def events_and_requests() -> list[Sample]:
    return [
        Sample("vllm:time_per_output_token_seconds_count", {}, 900),
        Sample("vllm:time_per_output_token_seconds_sum", {}, 9.0),
        Sample("vllm:inter_token_latency_seconds_count", {}, 800),
        Sample("vllm:inter_token_latency_seconds_sum", {}, 8.0),
        Sample("vllm:request_success_total", {"finished_reason": "stop"}, 6),
        Sample("vllm:request_success_total", {"finished_reason": "length"}, 2),
    ]


def test_a_family_of_another_version_is_not_read() -> None:
    def counted(version: str | None) -> int | None:
        found = pod_counters(events_and_requests(), SERVER, version=version)
        return found.tpot.count if found.tpot else None

    assert counted("0.10.1") == 900
    assert counted("0.13.0") == 800
    assert counted(None) == 800


def test_events_stay_beside_the_figure_of_requests_for_older_neighbours() -> None:
    more = [
        Sample("vllm:request_time_per_output_token_seconds_count", {}, 8),
        Sample("vllm:request_time_per_output_token_seconds_sum", {}, 0.08),
    ]
    found = pod_counters([*events_and_requests(), *more], SERVER, version="0.13.0")
    assert isinstance(found, PodCounters)
    assert found.tpot is not None
    assert (found.tpot.count, found.tpot_requests) == (8, None)
    assert found.events is not None
    assert (found.events.count, found.finished) == (800, 8)


def test_no_family_shadows_a_better_one() -> None:
    assert len({(family.figure, family.name) for family in FAMILIES}) == len(FAMILIES)
    assert len(series_names()) == len(set(series_names()))


def test_the_page_about_metrics_names_every_family_with_its_versions() -> None:
    page = PAGE.read_text(encoding="utf-8")
    rows = {
        cells[0].strip("` "): [cell.strip() for cell in cells[1:]]
        for line in page.splitlines()
        if (cells := re.findall(r"[^|]+", line)) and line.startswith("| `")
    }
    for family in FAMILIES:
        since = ".".join(map(str, family.since)) if family.since > (0, 0) else "any"
        until = ".".join(map(str, family.until)) if family.until else ""
        assert rows[family.name][1:3] == [since, until], family.name
