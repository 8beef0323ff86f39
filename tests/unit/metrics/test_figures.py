"""What the store's documents become as metrics."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.serving_world import ENVIRONMENT, MODEL, NEW, NOW, OLD, make_channel

from trainyard.documents.channel import Channel, HistoryEntry, Rejection, Track
from trainyard.documents.evidence import MetricVerdict, Verdict
from trainyard.documents.measurement import GateVerdict
from trainyard.documents.status import StepStatus
from trainyard.metrics.families import FAMILIES
from trainyard.metrics.figures import Published, RolloutTrace, Seen, families, model_of_plan
from trainyard.metrics.page import text_of

AT = NOW + timedelta(hours=1)
CHANNEL = {"environment": ENVIRONMENT, "model": MODEL}


class Page:
    """The page as Prometheus reads it."""

    def __init__(self, seen: Seen) -> None:
        self.samples = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text_of(seen).decode())
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float | None:
        return self.samples.get((name, tuple(sorted(labels.items()))))

    def of_channel(self, name: str, **labels: str) -> float | None:
        return self.value(f"trainyard_{name}", **CHANNEL, **labels)


def entry(event: str, seconds: float, rollout: int = 1) -> HistoryEntry:
    return HistoryEntry(at=NOW + timedelta(seconds=seconds), event=event, rollout=rollout)


def verdict() -> Verdict:
    metric = MetricVerdict(
        metric="ttft",
        outcome="HARM",
        stable_value=0.2,
        candidate_value=0.5,
        ratio=2.5,
        harm_margin=0.1,
        promote_margin=0.15,
        harm_evidence=6.0,
        harm_threshold=3.0,
        promote_evidence=0.0,
        promote_threshold=2.0,
        stable_requests=900,
        candidate_requests=100,
        blocks=4,
        note="",
    )
    return Verdict(
        outcome="HARM",
        metrics=(metric,),
        looks=4,
        exposed_requests=120,
        at=60.0,
        reason="It is slower.",
    )


def status(step: str, state: str = "done", **changes: Any) -> StepStatus:
    values: dict[str, Any] = {
        "plan_id": "adder-0123456789ab",
        "step": step,
        "target": "cpu",
        "state": state,
        "started_at": NOW,
        "updated_at": NOW + timedelta(seconds=30),
    }
    return StepStatus(**{**values, **changes})


def page_of(*channels: Channel, **seen: Any) -> Page:
    return Page(Seen(at=AT, channels=channels, **seen))


def test_a_channel_tells_its_releases_weights_and_phase() -> None:
    channel = make_channel().model_copy(
        update={
            "previous": (Track(release_id="adder-000000000000", since=NOW, verified=False),),
            "rejected": (Rejection(release_id="x", at=NOW, rollout=1, reason="slow"),),
        }
    )
    page = page_of(channel)

    def info(track: str, release: str, verified: str = "true") -> float | None:
        return page.of_channel(
            "channel_release_info", track=track, release=release, verified=verified
        )

    assert info("stable", OLD) == info("candidate", NEW) == 1
    assert info("previous", "adder-000000000000", "false") == 1
    assert page.of_channel("channel_weight_percent", track="stable") == 90
    assert page.of_channel("channel_weight_percent", track="candidate") == 10
    assert page.of_channel("channel_phase", phase="shifting") == 1
    assert page.of_channel("channel_phase", phase="idle") == 0
    assert page.of_channel("channel_rejected_releases") == 1


def test_a_channel_whose_rollout_is_over_is_idle() -> None:
    page = page_of(make_channel(ended=True))

    assert page.of_channel("channel_phase", phase="idle") == 1
    assert page.of_channel("rollout_in_progress") == 0
    assert page.of_channel("rollout_number") == 1
    for name in ("rollout_lease_seconds", "rollout_phase_since_timestamp_seconds"):
        assert page.of_channel(name) is None


def test_a_rollout_tells_what_the_judge_said_and_how_sure_it_is() -> None:
    channel = make_channel()
    assert channel.rollout is not None
    rollout = channel.rollout.model_copy(update={"verdict": verdict(), "held_since": NOW})
    trace = RolloutTrace(7, NOW + timedelta(seconds=50), {"fuse": 1})
    page = page_of(
        channel.model_copy(update={"rollout": rollout}), traces={(ENVIRONMENT, MODEL): trace}
    )

    assert page.of_channel("rollout_verdict", outcome="HARM") == 1
    assert page.of_channel("rollout_verdict", outcome="UNDECIDED") == 0
    assert page.of_channel("rollout_exposed_requests") == 120
    assert page.of_channel("rollout_evidence_ratio", metric="ttft", direction="harm") == 2
    assert page.of_channel("rollout_evidence_ratio", metric="ttft", direction="promote") == 0
    assert page.of_channel("rollout_metric_ratio", metric="ttft") == 2.5
    assert page.of_channel("rollout_held_since_timestamp_seconds") == NOW.timestamp()
    assert page.of_channel("rollout_lease_seconds") == 120
    assert page.of_channel("rollout_looks") == 7
    assert page.of_channel("rollout_last_look_timestamp_seconds") == NOW.timestamp() + 50
    assert page.of_channel("rollout_guard_events", event="fuse") == 1


@pytest.mark.parametrize(
    ("events", "seconds"),
    [
        ([("rollout_started", 0), ("ending", 40), ("rolled_back", 52)], 12),
        ([("rollout_started", 0), ("returned", 9)], 9),
        ([("rollout_started", 0), ("ending", 5), ("withdrawn", 9)], None),
        ([("rolled_back", 9)], None),
    ],
)
def test_the_seconds_of_a_rollback_begin_with_its_decision(
    events: list[tuple[str, float]], seconds: float | None
) -> None:
    history = tuple(entry(event, at) for event, at in events)
    page = page_of(make_channel().model_copy(update={"history": history}))

    assert page.of_channel("rollback_seconds") == seconds


def test_ends_of_rollouts_are_counted_and_have_their_last_time() -> None:
    history = (entry("promoted", 1), entry("rolled_back", 2, 2), entry("promoted", 3, 3))
    page = page_of(make_channel().model_copy(update={"history": history}))

    assert page.of_channel("rollouts_ended", outcome="promoted") == 2
    assert page.of_channel("rollouts_ended", outcome="rolled_back") == 1
    assert page.of_channel("rollouts_ended", outcome="withdrawn") == 0
    last = page.of_channel("channel_last_event_timestamp_seconds", event="promoted")
    assert last == NOW.timestamp() + 3


def test_bundles_found_are_hits_and_those_made_have_figures() -> None:
    made = {"compile_s": 28.5, "peak_memory_bytes": 3_000_000, "bytes": 1_800_000}
    page = page_of(
        statuses=(
            status("compile", detail=made),
            status("compile", plan_id="adder-1", reused=True, detail=made),
            status("download", target="", detail={"bytes": 5_000_000}),
        )
    )

    for result in ("hit", "miss"):
        assert page.value("trainyard_bundle_lookups", model="adder", result=result) == 1
    assert page.value("trainyard_compile_seconds", model="adder", target="cpu") == 28.5
    peak = page.value("trainyard_compile_peak_memory_bytes", model="adder", target="cpu")
    assert peak == 3_000_000
    for step, size in (("compile", 1_800_000), ("download", 5_000_000)):
        assert page.value("trainyard_moved_bytes", model="adder", step=step) == size
    assert page.value("trainyard_step_seconds", model="adder", step="compile", target="cpu") == 30


def test_steps_tell_failures_by_exit_code_and_signs_of_life() -> None:
    page = page_of(
        statuses=(
            status("measure", "failed", exit_code=20),
            status("measure", "running", updated_at=NOW),
            status("measure", "running", plan_id="adder-2", updated_at=AT),
        )
    )

    step = {"model": "adder", "step": "measure"}
    assert page.value("trainyard_steps", **step, state="running") == 2
    assert page.value("trainyard_step_failures", **step, exit_code="20") == 1
    assert page.value("trainyard_step_heartbeat_timestamp_seconds", **step) == NOW.timestamp()
    end = page.value("trainyard_step_last_end_timestamp_seconds", **step, state="failed")
    assert end == NOW.timestamp() + 30


def test_gates_and_releases_are_counted() -> None:
    page = page_of(
        verdicts=(
            GateVerdict(
                gate="accuracy",
                plan_id="adder-0123456789ab",
                target="cpu",
                measurement_id="m",
                outcome="fail",
                checks=(),
                summary="Too low.",
            ),
        ),
        releases={"adder": Published(3, NOW)},
        unreadable={"status": 2},
    )

    assert (
        page.value("trainyard_gate_verdicts", model="adder", gate="accuracy", outcome="fail") == 1
    )
    assert page.value("trainyard_releases", model="adder") == 3
    published = page.value("trainyard_release_last_published_timestamp_seconds", model="adder")
    assert published == NOW.timestamp()
    assert page.value("trainyard_metrics_unreadable_documents", folder="status") == 2
    assert page.value("trainyard_metrics_last_look_timestamp_seconds") == AT.timestamp()


def test_releases_of_the_past_are_in_no_label() -> None:
    history = tuple(
        HistoryEntry(at=NOW, event="promoted", release_id=f"adder-{n:012x}") for n in range(150)
    )
    channel = make_channel().model_copy(update={"history": history})
    few = len(families(Seen(at=AT, channels=(make_channel(),))))

    assert len(families(Seen(at=AT, channels=(channel,)))) <= few + 2
    assert text_of(Seen(at=AT, channels=(channel,))).count(b"adder-") < 5


def test_every_family_is_named_explained_and_has_its_unit() -> None:
    for name, family in FAMILIES.items():
        assert name.startswith("trainyard_")
        # Counters that a removed document would reset are none; see the module.
        assert not name.endswith("_total")
        assert family.help.endswith(".")
        assert len(set(family.labels)) == len(family.labels)


@pytest.mark.parametrize(
    ("plan_id", "model"), [("llama-3-1-8b-0123456789ab", "llama-3-1-8b"), ("plan", "plan")]
)
def test_the_model_of_a_plan_is_in_its_id(plan_id: str, model: str) -> None:
    assert model_of_plan(plan_id) == model


def test_times_are_seconds_since_1970() -> None:
    moment = datetime.fromisoformat("1970-01-01T00:01:00+00:00")
    page = Page(Seen(at=moment))

    assert page.value("trainyard_metrics_last_look_timestamp_seconds") == 60
