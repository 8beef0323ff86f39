"""Pages are whole HTML, need nothing from outside, and show what their documents say."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from html.parser import HTMLParser
from typing import Any

import pytest
from tests.unit.yard import FIGURES, MOMENT, measurement, plan, spec

from trainyard.documents.channel import (
    Channel,
    HistoryEntry,
    Rollout,
    RolloutDriver,
    RolloutPlan,
    Track,
    Weights,
)
from trainyard.documents.evidence import JudgeSpec, MetricVerdict, Verdict, default_metrics
from trainyard.documents.look import Look, RouteCounters, Snapshot
from trainyard.documents.measurement import GateVerdict, Measurement
from trainyard.documents.plan import GateName, Plan
from trainyard.documents.release import Pin, Release, Signature
from trainyard.gates.verdict import derive_verdict
from trainyard.reports.gate import gate_report_html
from trainyard.reports.release import release_report_html
from trainyard.reports.rollout import rollout_report_html
from trainyard.spec.model import RolloutStep

VOID = {"meta", "link", "br", "hr", "img", "input"}
NASTY = "<script>alert('x')</script>&\"'"


class Page(HTMLParser):
    """Reads a page: its text, its tags, and whether every tag is closed where it should be."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"an attribute of {tag} is given twice"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"{tag} is closed and was not open"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "head" not in self.open:
            self.text = f"{self.text} {data.strip()}".strip()

    def values(self, name: str) -> list[str]:
        return [value or "" for each, value in self.attributes if each == name]


def verdict(
    gate: GateName, measured: Measurement, baseline: Measurement | None = None
) -> GateVerdict:
    derived = derive_verdict(
        gate,
        spec().gates,
        plan_id="adder-plan",
        target="cpu",
        measurement=measured,
        baseline=baseline,
    )
    return derived.verdict.model_copy(update={"created_at": MOMENT})


def release(**changes: Any) -> Release:
    model_spec = spec()
    values: dict[str, Any] = {
        "created_at": MOMENT,
        "release_id": "adder-0123456789ab",
        "model": "adder",
        "target": model_spec.targets[0],
        "lane": "cpu",
        "checkpoint_key": "checkpoints/adder/v1/manifest.json",
        "checkpoint_digest": "c" * 64,
        "revision": "v1",
        "compile_key": "k" * 64,
        "bundle_digest": "b" * 64,
        "serving": {},
        "serving_digest": "s" * 64,
        "served_model_name": "adder",
        "toolchain": {},
        "source": "file:models",
        "measurement_id": "candidate",
        "spec": model_spec,
        "pins": (Pin(name="measurement", key="measurements/m1.json", sha256="a" * 64),),
        "signature": Signature(key_id="f00dfeed" * 8, scheme="ed25519", signer="yard crew"),
    }
    return Release(**{**values, **changes})


def judged(
    at: float, *, harm: float, promote: float, outcome: Any = "UNDECIDED", note: str = ""
) -> Verdict:
    metrics = tuple(
        MetricVerdict(
            metric=name,
            outcome=outcome,
            stable_value=0.2,
            candidate_value=0.5,
            ratio=2.5,
            harm_margin=0.1,
            promote_margin=0.15,
            harm_evidence=harm * factor,
            harm_threshold=2.5,
            promote_evidence=promote * factor,
            promote_threshold=1.7,
            stable_requests=900,
            candidate_requests=100,
            blocks=4,
            note=note,
        )
        for name, factor in (("ttft", 1.0), ("errors", 0.4))
    )
    return Verdict(
        outcome=outcome,
        metrics=metrics,
        looks=4,
        exposed_requests=100,
        at=at,
        reason="ttft is 2.5 times as long.",
    )


def look(slot: int, weight: int | None, found: Verdict | None) -> Look:
    route = None
    if weight is not None:
        weights = {"adder-aaaaaaaaaaaa": 100 - weight, "adder-bbbbbbbbbbbb": weight}
        route = RouteCounters(epoch="e", weights=weights, releases={})
    snapshot = Snapshot(
        at=MOMENT + timedelta(seconds=30 * slot),
        phase="shifting",
        step_index=0,
        pods=(),
        route=route,
    )
    return Look(rollout=3, slot=slot, snapshot=snapshot, verdict=found)


LOOKS = [
    look(0, 0, None),
    look(1, 10, judged(30, harm=0.5, promote=0.1)),
    look(2, None, judged(60, harm=1.5, promote=-0.4)),
    look(3, 10, judged(90, harm=2.0, promote=-1.0)),
    look(4, 50, judged(120, harm=2.2, promote=-1.5)),
    look(5, 50, judged(150, harm=2.6, promote=-9.0, outcome="HARM")),
]


def rollout(**changes: Any) -> Rollout:
    values: dict[str, Any] = {
        "number": 3,
        "release_id": "adder-bbbbbbbbbbbb",
        "reference_id": "adder-aaaaaaaaaaaa",
        "phase": "rolling_back",
        "plan": RolloutPlan(
            kind="canary",
            capacity="surge",
            replicas=2,
            steps=(RolloutStep(weight=10, hold_s=60), RolloutStep(weight=50, hold_s=60)),
            bake_s=60,
            holdback_weight=10,
            max_duration_s=600,
            on_undecided="hold",
            max_hold_s=600,
            warm_up_requests=4,
            deploy_timeout_s=600,
            drain_timeout_s=60,
            lease_s=120,
            judge=JudgeSpec(metrics=default_metrics(), max_duration_s=600),
        ),
        "driver": RolloutDriver(run_id="run", attempt=1, epoch=1),
        "requested_by": "ada",
        "started_at": MOMENT,
        "phase_since": MOMENT,
        "outcome": "rolled_back",
        "reason": "Harm was proven.",
    }
    return Rollout(**{**values, **changes})


def channel(**changes: Any) -> Channel:
    history = (
        HistoryEntry(at=MOMENT, event="rollout_started", rollout=2, release_id="adder-older"),
        HistoryEntry(at=MOMENT, event="rollout_started", rollout=3, who="ada"),
        HistoryEntry(at=MOMENT, event="rolled_back", rollout=3, detail={"reason": "harm", "n": 1}),
    )
    values: dict[str, Any] = {
        "model": "adder",
        "environment": "staging",
        "generation": 12,
        "stable": Track(release_id="adder-aaaaaaaaaaaa", since=MOMENT),
        "weights": Weights(),
        "history": history,
    }
    return Channel(**{**values, **changes})


def gate_page() -> str:
    measured = measurement(figures={**FIGURES, "ttft_p99_ms": 500.0, "output_tokens_per_s": 45.0})
    return gate_report_html(plan(), measured, verdict("latency", measured, measurement("stable")))


def release_page() -> str:
    return release_report_html(
        plan(),
        measurement(),
        [verdict("accuracy", measurement()), verdict("latency", measurement())],
        release(),
    )


def rollout_page() -> str:
    return rollout_report_html(channel(), rollout(), LOOKS)


def nothing_yet() -> str:
    return release_report_html(plan(), measurement(latency=(), accuracy=()), [], None)


def rollout_without_looks() -> str:
    empty = channel(stable=None, history=())
    return rollout_report_html(empty, rollout(outcome=None, phase="deploying", reason=""), [])


PAGES = [gate_page, release_page, rollout_page, nothing_yet, rollout_without_looks]


@pytest.mark.parametrize("make", PAGES)
def test_a_page_is_well_formed(make: Callable[[], str]) -> None:
    page = Page(make())

    assert page.open == []
    assert page.tags[0] == "html"
    assert {"title", "h1", "main", "footer"} <= set(page.tags)


@pytest.mark.parametrize("make", PAGES)
def test_a_page_needs_nothing_from_outside_and_runs_nothing(make: Callable[[], str]) -> None:
    html = make()

    page = Page(html)
    assert re.findall(r"(?:https?:)?//[a-z]|url\(|@import|javascript:", html) == []
    assert {"script", "link", "iframe", "object", "img"}.isdisjoint(page.tags)
    assert not [name for name, _ in page.attributes if name in {"src", "href"} or name[:2] == "on"]
    assert any("default-src 'none'" in value for value in page.values("content"))


@pytest.mark.parametrize("make", PAGES)
def test_a_page_has_a_light_and_a_dark_face(make: Callable[[], str]) -> None:
    html = make()

    light, dark = re.findall(r":root(?:\.dark)? \{([^}]*)\}", html)
    names = [set(re.findall(r"(--[a-z]+):", face)) for face in (light, dark)]
    assert names[0] == names[1]
    assert names[0] == set(re.findall(r"var\((--[a-z]+)\)", html))
    assert "prefers-color-scheme: dark" in html


def test_the_gate_page_shows_every_check() -> None:
    page = Page(gate_page())

    assert "adder v1: latency gate ✗ fail" in page.text
    assert "level busy: ttft_p99_ms 500 <= 400 ✗ fail" in page.text
    assert "level busy: output_tokens_per_s 45 >= 50 ! warning" in page.text
    assert "500 <= stable (210) + 20 % ✗ fail" in page.text
    assert "500, needed <= 400" in page.values("aria-label")


def test_the_gate_page_says_why_a_comparison_was_skipped() -> None:
    measured = measurement()

    page = Page(gate_report_html(plan(), measured, verdict("accuracy", measured)))

    assert "There is no stable release to compare with." in page.text
    assert "skipped" in page.text
    assert "nothing: there is no stable release" in page.text


def test_the_gate_page_shows_a_missing_figure() -> None:
    measured = measurement(accuracy=())

    page = Page(gate_report_html(plan(), measured, verdict("accuracy", measured)))

    assert "no single score for this task and metric. - >= 0.9 ✗ fail" in page.text
    assert "svg" not in page.tags


def test_the_release_page_shows_gates_figures_and_identity() -> None:
    page = Page(release_page())

    assert "adder-0123456789ab ✓ published" in page.text
    assert "Accuracy gate ✓ pass" in page.text
    assert "Latency gate ✓ pass" in page.text
    assert "ttft_p99_ms 210" in page.text
    assert "completed requests 64" in page.text
    assert f"Bundle digest {'b' * 64}" in page.text
    assert f"by yard crew with the ed25519 key {'f00dfeed' * 8}" in page.text
    assert "Source file:models" in page.text
    assert "Made by urn:trainyard:builder, trainyard" in page.text
    assert f"measurement measurements/m1.json, sha256 {'a' * 64}" in page.text
    assert "processor Test CPU" in page.text
    assert "ready after 12.5 s, engine 4.25 s, 0 files compiled anew" in page.text


def test_the_release_page_can_be_shown_before_there_is_a_release() -> None:
    page = Page(nothing_yet())

    assert "not published" in page.text
    assert "No gate has judged it yet." in page.text
    assert "No load was measured." in page.text


def test_the_rollout_page_shows_evidence_events_and_outcome() -> None:
    page = Page(rollout_page())

    assert "adder in staging: rollout 3 ✗ rolled back" in page.text
    assert "Harm was proven." in page.text
    assert page.tags.count("polyline") == 4
    assert page.tags.count("circle") == 20
    assert page.tags.count("polygon") == 1
    assert "harm, 150 s: 2.6 of 2.5" in page.text
    assert "ttft 0.2 0.5 2.5 900, 100 ✗ harm" in page.text
    assert "reason: harm" in page.text
    assert "adder-older" not in page.text
    assert "10 % for 60 s, 50 % for 60 s; bake 60 s" in page.text


@pytest.mark.parametrize(
    ("outcome", "words"),
    [("promoted", "✓ promoted"), ("withdrawn", "! withdrawn"), (None, "… rolling back")],
)
def test_the_rollout_page_says_how_it_stands(outcome: Any, words: str) -> None:
    page = Page(rollout_report_html(channel(), rollout(outcome=outcome), LOOKS))

    assert f"rollout 3 {words}" in page.text


def test_the_rollout_page_without_looks_says_so() -> None:
    page = Page(rollout_without_looks())

    assert "The judge has not looked yet." in page.text
    assert "Nothing is on record." in page.text
    assert "svg" not in page.tags


def test_text_of_others_is_shown_and_not_run() -> None:
    nasty_spec = spec(description=NASTY, owner=NASTY)
    measured = measurement(machine={NASTY: NASTY})
    nasty_plan: Plan = plan(model_spec=nasty_spec)
    bad = verdict("latency", measured).model_copy(update={"summary": NASTY})
    checks = tuple(check.model_copy(update={"note": NASTY, "what": NASTY}) for check in bad.checks)
    bad = bad.model_copy(update={"checks": checks})
    nasty_looks = [look(1, 10, judged(30, harm=1, promote=1, note=NASTY))]
    pages = [
        gate_report_html(nasty_plan, measured, bad),
        release_report_html(nasty_plan, measured, [bad], release()),
        rollout_report_html(channel(), rollout(reason=NASTY, requested_by=NASTY), nasty_looks),
    ]

    for html in pages:
        page = Page(html)
        assert "script" not in page.tags
        assert NASTY in page.text
