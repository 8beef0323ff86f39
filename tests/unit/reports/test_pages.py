"""Pages are whole HTML, need nothing from outside, and show what their documents say."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from html.parser import HTMLParser
from typing import Any

import pytest
from tests.report_world import PRICE, behaviour, measured, model_spec, release, report
from tests.unit.yard import FIGURES, MOMENT, measurement, plan, spec

from trainyard.documents.channel import (
    Beyond,
    Channel,
    HistoryEntry,
    Rollout,
    RolloutDriver,
    RolloutPlan,
    Track,
    Weights,
)
from trainyard.documents.evidence import JudgeSpec, MetricVerdict, Verdict, default_metrics
from trainyard.documents.logits import LogitFigures, LogitReport
from trainyard.documents.look import Look, RouteCounters, Snapshot
from trainyard.documents.measurement import GateVerdict, Measurement
from trainyard.documents.plan import GateName, Plan
from trainyard.gates.verdict import derive_verdict
from trainyard.reports.gate import gate_report_html
from trainyard.reports.release import ReleaseReport, release_report_html
from trainyard.reports.rollout import rollout_report_html
from trainyard.spec.model import LogitValidation, RolloutStep

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
    gate: GateName, candidate: Measurement, baseline: Measurement | None = None
) -> GateVerdict:
    derived = derive_verdict(
        gate,
        spec().gates,
        plan_id="adder-plan",
        target="cpu",
        measurement=candidate,
        baseline=baseline,
    )
    return derived.verdict.model_copy(update={"created_at": MOMENT})


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
    bad = measurement(figures={**FIGURES, "ttft_p99_ms": 500.0, "output_tokens_per_s": 45.0})
    return gate_report_html(plan(), bad, verdict("latency", bad, measurement("stable")))


def release_page() -> str:
    return release_report_html(report())


def rollout_page() -> str:
    return rollout_report_html(channel(), rollout(), LOOKS)


def release_without_figures() -> str:
    bare = measurement(latency=(), accuracy=())
    return release_report_html(report(measurement=bare, baseline=None, verdicts=(), targets=()))


def release_without_measurement() -> str:
    gone = ("measurements/m1.json",)
    return release_report_html(report(measurement=None, baseline=None, lost=gone))


def rollout_without_looks() -> str:
    empty = channel(stable=None, history=())
    return rollout_report_html(empty, rollout(outcome=None, phase="deploying", reason=""), [])


PAGES = [
    gate_page,
    release_page,
    rollout_page,
    release_without_figures,
    release_without_measurement,
    rollout_without_looks,
]


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
    page = Page(gate_report_html(plan(), measurement(), verdict("accuracy", measurement())))

    assert "There is no stable release to compare with." in page.text
    assert "skipped" in page.text
    assert "nothing: there is no stable release" in page.text


def test_the_gate_page_shows_a_missing_figure() -> None:
    bare = measurement(accuracy=())

    page = Page(gate_report_html(plan(), bare, verdict("accuracy", bare)))

    assert "no single score for this task and metric. - >= 0.9 ✗ fail" in page.text
    assert "svg" not in page.tags


def test_the_release_page_shows_the_verdict_first() -> None:
    page = Page(release_page())

    assert page.text.startswith("adder-0123456789ab ✗ fail")
    places = [
        page.text.index(words)
        for words in (
            "Accuracy gate ✗ fail",
            "Latency gate ! warning",
            "Latency against load",
            "Distributions",
            "Parity with the reference",
            "Behaviour",
            "Cost by target",
            "Start times",
            "What it is made of",
        )
    ]
    assert places == sorted(places)


def test_the_release_page_shows_gates_figures_and_identity() -> None:
    page = Page(release_page())

    assert "ttft_p99_ms 461.1 428.8 to 516.4 435 404.6 to 487.2" in page.text
    assert "The repeats gave 428.8 to 516.4, on both sides of the bound" in page.text
    assert "11.31 requests a second, with the prompts and answers of level chat." in page.text
    assert "prompts of 700 to 3000 tokens, answers of 64 to 256" in page.text
    assert f"Bundle digest {'b' * 64}" in page.text
    assert f"by yard crew with the ed25519 key {'f00dfeed' * 8}" in page.text
    assert "Source file:models" in page.text
    assert "Made by urn:trainyard:builder, trainyard" in page.text
    assert f"measurement measurements/m1.json, sha256 {'a' * 64}" in page.text
    assert "processor Some CPU" in page.text


def test_the_release_page_draws_what_it_says() -> None:
    page = Page(release_page())

    # Three metrics: curves of three percentiles, and a distribution of two releases at two levels.
    assert page.tags.count("polyline") == 3 * 3 + 2 * 3 * 2
    for words in (
        "Time to first token in milliseconds against requests a second",
        "Scores of gsm8k_cot exact_match,strict-match with their 95 % intervals",
        "Agreement with the reference by position of the answer",
    ):
        assert words in page.values("aria-label")
    assert "level chat, p99: 461 ms" in page.text
    assert "SLO 500 ms" in page.text
    assert "11.31 a second meets it" in page.text
    assert "candidate: 50% within 159 ms" in page.text
    assert "candidate: 0.75, 95 % interval 0.714 to 0.786, 541 samples" in page.text
    assert "position 2: 17 of 20 agree, 2 excused" in page.text


def test_the_release_page_shows_behaviour_and_ranks_targets_by_cost() -> None:
    page = Page(release_page())

    assert "stop strings tolerance Rounding. 3 1 0" in page.text
    assert "Sent stop=END: END came, nothing was expected." in page.text
    cheap, dear, unknown = (page.text.rindex(name) for name in ("$0.0422", "$7.6", "local costs"))
    assert cheap < dear < unknown
    assert "from the bundle 107 s compiling 497 s stable, from its bundle 107 s" in page.text


@pytest.mark.parametrize(
    ("severity", "passed", "badge"),
    [("info", True, "✓ pass"), ("info", False, "i outside"), ("warning", False, "! warning")],
)
def test_the_release_page_shows_logits_as_not_the_served_graph(
    severity: Any, passed: bool, badge: str
) -> None:
    settings = LogitValidation(severity=severity)
    logits = LogitReport(
        measurement_id="candidate",
        model="adder",
        revision="v1",
        checkpoint_digest="c" * 64,
        target="cpu",
        settings=settings,
        figures=LogitFigures(
            passed=passed,
            prompts=(True, passed),
            metrics={"agg_bc": "FAIL", "agg_sigma_ratio": 1.25},
            made_with={"vllm": "0.24.0"},
            seconds=812.0,
        ),
        machine={},
    )
    asked = release()
    accuracy = asked.spec.gates.accuracy.model_copy(update={"logit_validation": settings})
    gates = asked.spec.gates.model_copy(update={"accuracy": accuracy})
    asked = asked.model_copy(update={"spec": asked.spec.model_copy(update={"gates": gates})})
    page = Page(release_report_html(report(release=asked, logits=logits)))

    assert "Logit validation not the served graph" in page.text
    assert badge in page.text
    assert f"{2 if passed else 1} of 2 prompts are within the fixed tolerances" in page.text
    assert "agg_bc FAIL agg_sigma_ratio 1.25" in page.text
    missing = Page(release_report_html(report(release=asked)))
    assert "there is no report of it" in missing.text
    assert "Logit validation" not in Page(release_page()).text


def test_the_release_page_can_do_without_figures() -> None:
    page = Page(release_without_figures())

    assert "No verdict is on record." in page.text
    assert "No load was measured." in page.text
    assert "No task was scored." in page.text
    assert "polyline" not in page.tags


def test_the_release_page_says_what_is_gone() -> None:
    page = Page(release_without_measurement())

    assert "The measurement candidate is gone." in page.text
    assert "measurements/m1.json is gone or was changed since it was signed." in page.text


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


def test_the_rollout_page_says_what_was_not_measured() -> None:
    why = "at least 10% of the newest 100 prompts are longer"
    beyond = (Beyond(kind="prompts", since=MOMENT, why=why),)
    page = Page(rollout_report_html(channel(), rollout(beyond=beyond), LOOKS))

    assert f"beyond what this release was measured with: {why}." in page.text
    assert "not measured" not in Page(rollout_page()).text


def test_the_rollout_page_does_not_wait_for_what_can_only_show_harm() -> None:
    last = judged(150, harm=0.5, promote=2.0)
    only = last.metrics[0].model_copy(
        update={"metric": "empty", "promote_evidence": 0.0, "promote_threshold": 0.0}
    )
    absent = only.model_copy(update={"metric": "aborted", "blocks": 0})
    verdict = last.model_copy(update={"metrics": (*last.metrics, only, absent)})
    page = Page(rollout_report_html(channel(), rollout(), [look(5, 50, verdict)]))

    assert "empty 0.2 0.5 2.5 900, 100 no harm shown" in page.text
    assert "aborted 0.2 0.5 2.5 900, 100 no data" in page.text
    # Two curves of ttft and of errors each, one of empty, none of what has no data.
    assert page.tags.count("polyline") == 5


def test_the_rollout_page_without_looks_says_so() -> None:
    page = Page(rollout_without_looks())

    assert "The judge has not looked yet." in page.text
    assert "Nothing is on record." in page.text
    assert "svg" not in page.tags


def nasty_report(bad: GateVerdict) -> ReleaseReport:
    """Return a report in which everything that somebody else may write is a script."""
    figures = measured(machine={NASTY: NASTY}, toolchain={NASTY: NASTY})
    levels = tuple(
        each.model_copy(update={"errors": (NASTY,), "name": NASTY}) for each in figures.latency
    )
    scores = tuple(each.model_copy(update={"name": NASTY}) for each in figures.accuracy)
    assert figures.search is not None
    found = figures.search.model_copy(update={"level": NASTY, "reason": NASTY})
    price = PRICE.model_copy(update={"source": NASTY})
    line = report().targets[0]
    return report(
        release=release(spec=model_spec(description=NASTY, owner=NASTY), source=NASTY, image=NASTY),
        problem=NASTY,
        verdicts=(bad,),
        measurement=figures.model_copy(
            update={"latency": levels, "accuracy": scores, "search": found}
        ),
        targets=(replace(line, target=NASTY, price=price, cost=None, why_none=NASTY), line),
        lost=(NASTY,),
        parity=None,
        behaviour=behaviour(NASTY),
    )


def test_text_of_others_is_shown_and_not_run() -> None:
    nasty_spec = spec(description=NASTY, owner=NASTY)
    bare = measurement(machine={NASTY: NASTY})
    nasty_plan: Plan = plan(model_spec=nasty_spec)
    bad = verdict("latency", bare).model_copy(update={"summary": NASTY})
    checks = tuple(check.model_copy(update={"note": NASTY, "what": NASTY}) for check in bad.checks)
    bad = bad.model_copy(update={"checks": checks})
    nasty_looks = [look(1, 10, judged(30, harm=1, promote=1, note=NASTY))]
    pages = [
        gate_report_html(nasty_plan, bare, bad),
        release_report_html(nasty_report(bad)),
        rollout_report_html(channel(), rollout(reason=NASTY, requested_by=NASTY), nasty_looks),
    ]

    for html in pages:
        page = Page(html)
        assert "script" not in page.tags
        assert NASTY in page.text
