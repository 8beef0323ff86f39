"""What the demonstration tells about a run: each event once, and the ending of this run."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import pytest
from tests.serving_world import NEW, NOW, OLD, make_channel
from tests.unit.yard import Yard

from trainyard.demo.narrator import STEPS, Narrator, describe_ending
from trainyard.documents.channel import Channel, HistoryEntry
from trainyard.documents.evidence import MetricVerdict, Verdict
from trainyard.documents.plan import plan_id_of_run
from trainyard.documents.status import StepStatus
from trainyard.store.layout import channel_key, release_key, status_key

State = Literal["running", "done", "failed"]


class Stage:
    """A store in which a run leaves its traces, and the narrator that reads them."""

    def __init__(self, home: Path, channel: Channel | None = None) -> None:
        self.store = Yard(home).store
        if channel is not None:
            self.keep(channel)
        self.narrator = Narrator(self.store, "adder", "staging", "neuron_release", "demo-1")

    def keep(self, channel: Channel) -> None:
        self.store.put(channel_key("adder", "staging"), channel.to_bytes())

    def step(self, name: str, state: State, *, seconds: float = 7, **more: Any) -> None:
        """Leave the status of a step; steps start in their order."""
        started = NOW + timedelta(minutes=STEPS.index(name))
        status = StepStatus(
            plan_id=self.narrator.plan_id,
            step=name,
            target="" if name in {"plan", "download"} else "cpu",
            state=state,
            started_at=started,
            updated_at=started + timedelta(seconds=seconds),
            **{"reason": f"{name} says so.", **more},
        )
        self.store.put(status_key(status.plan_id, name, status.target), status.to_bytes())

    def all_done(self, release_id: str = NEW) -> None:
        for name in STEPS:
            key = release_key("adder", release_id) if name == "publish" else "some/key.json"
            self.step(name, "done", output_key=key)


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


def noted(channel: Channel, *entries: HistoryEntry) -> Channel:
    generation = max((entry.generation for entry in entries), default=channel.generation)
    history = (*channel.history, *entries)
    return channel.model_copy(update={"history": history, "generation": generation})


def event(generation: int, name: str, **detail: Any) -> HistoryEntry:
    return HistoryEntry(at=NOW, generation=generation, event=name, release_id=NEW, detail=detail)


def looked(channel: Channel, looks: int, outcome: Any = "UNDECIDED") -> Channel:
    assert channel.rollout is not None
    verdict = Verdict(
        outcome=outcome, metrics=(), looks=looks, exposed_requests=9, at=5.0, reason="Figures."
    )
    rollout = channel.rollout.model_copy(update={"verdict": verdict})
    return channel.model_copy(update={"rollout": rollout})


class TestNews:
    def test_it_follows_the_plan_of_its_run(self, stage: Stage) -> None:
        assert stage.narrator.plan_id == plan_id_of_run("adder", "neuron_release", "demo-1")
        assert stage.narrator.statuses() == []
        assert stage.narrator.channel().generation == 0

    def test_a_step_is_told_once_when_it_is_over(self, stage: Stage) -> None:
        stage.step("download", "running")
        assert stage.narrator.news() == []
        stage.step("download", "done", seconds=12.4)
        assert stage.narrator.news() == ["download done in 12 s: download says so."]
        assert stage.narrator.news() == []

    def test_reuse_and_failure_look_different(self, stage: Stage) -> None:
        stage.step("download", "done", reused=True)
        stage.step("compile", "failed", exit_code=20, reason="The compiler says no.")
        reused, failed = stage.narrator.news()
        assert "reused" in reused
        assert " s:" not in reused
        assert "compile failed" in failed
        assert "The compiler says no." in failed

    def test_a_retry_is_told_again(self, stage: Stage) -> None:
        stage.step("compile", "failed")
        stage.narrator.news()
        stage.step("compile", "running", attempt=2)
        assert stage.narrator.news() == []
        stage.step("compile", "done", attempt=2)
        assert len(stage.narrator.news()) == 1

    def test_events_of_the_channel_are_told_in_order(self, stage: Stage) -> None:
        channel = make_channel(generation=0)
        stage.keep(noted(channel, event(1, "weights", weight=10), event(2, "weights", weight=50)))
        assert stage.narrator.news() == [
            f"{NEW} gets 10 % of the traffic",
            f"{NEW} gets 50 % of the traffic",
        ]
        assert stage.narrator.news() == []

    def test_what_was_before_the_run_is_no_news(self, tmp_path: Path) -> None:
        old = looked(noted(make_channel(), event(4, "weights", weight=10)), 3)
        stage = Stage(tmp_path, old)
        assert stage.narrator.news() == []
        stage.keep(noted(old, event(5, "promoted", why="It is good.")))
        assert stage.narrator.news() == ["promoted: It is good."]

    def test_each_look_is_told_once(self, stage: Stage) -> None:
        channel = make_channel(number=2)
        stage.keep(looked(channel, 1))
        (first,) = stage.narrator.news()
        assert first.startswith("look 1")
        assert first.endswith("undecided")
        assert stage.narrator.news() == []
        stage.keep(looked(channel, 2, "NON_INFERIOR"))
        (second,) = stage.narrator.news()
        assert second.startswith("look 2")
        assert second.endswith("non-inferior")

    def test_the_looks_of_the_next_rollout_count_anew(self, tmp_path: Path) -> None:
        stage = Stage(tmp_path, looked(make_channel(number=1), 9))
        stage.keep(looked(make_channel(number=2), 1))
        assert [line.split(" at ")[0] for line in stage.narrator.news()] == ["look 1"]


class TestProgress:
    def test_it_waits_for_airflow_first(self, stage: Stage) -> None:
        assert stage.narrator.progress() == (0.0, "waiting for Airflow")

    def test_it_grows_with_each_step(self, stage: Stage) -> None:
        seen = []
        for name in STEPS:
            stage.step(name, "running", progress=0.5)
            seen.append(stage.narrator.progress())
            stage.step(name, "done")
            seen.append(stage.narrator.progress())
        shares = [share for share, _ in seen]
        assert shares == sorted(shares)
        assert all(0 <= share < 1 for share in shares)
        assert seen[2][1] == "download: download says so."

    def test_the_rollout_comes_last(self, stage: Stage) -> None:
        stage.all_done()
        stage.keep(make_channel(weight=10, phase="holding"))
        share, what = stage.narrator.progress()
        assert what == "rollout: holding, candidate 10 %"
        assert share == len(STEPS) / (len(STEPS) + 1)


class TestEnding:
    def ended(self, outcome: str, kind: str = "canary") -> Channel:
        channel = make_channel(candidate=NEW, stable=OLD, number=3)
        assert channel.rollout is not None
        rollout = channel.rollout.model_copy(
            update={
                "outcome": outcome,
                "reason": "Because.",
                "plan": channel.rollout.plan.model_copy(update={"kind": kind}),
            }
        )
        return channel.model_copy(update={"rollout": rollout})

    @pytest.mark.parametrize(
        ("outcome", "kind", "ending"),
        [
            ("promoted", "bootstrap", "first stable release"),
            ("promoted", "canary", "promoted"),
            ("rolled_back", "canary", "rolled back"),
            ("withdrawn", "canary", "withdrawn"),
        ],
    )
    def test_a_rollout_ends(self, stage: Stage, outcome: str, kind: str, ending: str) -> None:
        stage.all_done()
        stage.keep(self.ended(outcome, kind))
        assert describe_ending(stage.narrator) == (NEW, ending, "Because.")

    def test_the_judges_figures_are_told(self, stage: Stage) -> None:
        stage.all_done()
        harmed = MetricVerdict(
            metric="ttft",
            outcome="HARM",
            stable_value=0.01,
            candidate_value=0.5,
            ratio=50.0,
            harm_margin=1.0,
            promote_margin=1.5,
            harm_evidence=5.25,
            harm_threshold=2.75,
            promote_evidence=-3.0,
            promote_threshold=1.5,
            stable_requests=60,
            candidate_requests=58,
            blocks=4,
            note="",
        )
        quiet = {"outcome": "UNDECIDED", "promote_evidence": 0.0, "promote_threshold": 0.0}
        only = harmed.model_copy(update={**quiet, "metric": "truncated", "harm_evidence": 1.1})
        verdict = Verdict(
            outcome="HARM",
            metrics=(harmed, only),
            looks=4,
            exposed_requests=58,
            at=20.0,
            reason="Because.",
        )
        channel = self.ended("rolled_back")
        assert channel.rollout is not None
        rollout = channel.rollout.model_copy(update={"verdict": verdict})
        stage.keep(channel.model_copy(update={"rollout": rollout}))
        assert describe_ending(stage.narrator)[2] == (
            "Because. Evidence: ttft 5.2 (needed 2.8); 4 looks, 58 requests exposed."
        )
        (line,) = [each for each in stage.narrator.news() if each.startswith("look")]
        assert "truncated 50.0% (stable 1.0%) 40% of a proof of harm" in line
        promoted = verdict.model_copy(update={"outcome": "NON_INFERIOR", "metrics": (only,)})
        rollout = channel.rollout.model_copy(update={"verdict": promoted})
        stage.keep(channel.model_copy(update={"rollout": rollout}))
        assert describe_ending(stage.narrator)[2] == "Because. 4 looks, 58 requests exposed."

    @pytest.mark.parametrize("gate", ["accuracy", "latency"])
    def test_a_gate_stops_it(self, stage: Stage, gate: str) -> None:
        for name in ("plan", "download", "compile", "measure"):
            stage.step(name, "done")
        stage.step(f"{gate}-gate", "failed", exit_code=20, reason="0.4 is less than 0.75.")
        ending = ("", f"stopped by the {gate} gate", "0.4 is less than 0.75.")
        assert describe_ending(stage.narrator) == ending

    def test_a_step_fails(self, stage: Stage) -> None:
        stage.step("plan", "failed", exit_code=10, reason="No such revision.")
        assert describe_ending(stage.narrator) == ("", "failed in plan", "No such revision.")

    def test_nothing_is_published(self, stage: Stage) -> None:
        stage.step("plan", "done")
        assert describe_ending(stage.narrator)[1] == "failed before it was published"

    def test_nothing_is_promoted(self, stage: Stage) -> None:
        stage.all_done()
        assert describe_ending(stage.narrator)[:2] == (NEW, "published, not promoted")

    def test_the_rollout_of_an_earlier_run_is_not_this_ones_ending(self, tmp_path: Path) -> None:
        """The promotion may have been refused before it began."""
        stage = Stage(tmp_path, self.ended("promoted"))
        stage.all_done()
        assert describe_ending(stage.narrator)[1] == "published, not promoted"
