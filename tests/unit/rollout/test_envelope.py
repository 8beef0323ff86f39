"""Live traffic beside the loads that were measured: only what the counters prove is said."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from tests.unit.rollout.machine import NEW, NOW, OLD, make_plan, requested, used_channel

from trainyard.documents.look import Histogram, PodCounters, RouteCounters, Snapshot
from trainyard.documents.measurement import Envelope
from trainyard.rollout.envelope import WINDOW_S, beyond_envelope
from trainyard.rollout.events import AbortRequested, Notify, TrafficBeyond
from trainyard.rollout.state_machine import commands_for, step

ENVELOPE = Envelope(
    input_tokens=(16, 480), output_tokens=(1, 64), max_concurrency=16, max_requests_per_s=4.0
)
EDGES = (100, 200, 500, 1000, 2000)


def pod(
    *lengths: int, release: str = OLD, in_flight: int | None = 0, **changes: Any
) -> PodCounters:
    """Return a server that has finished requests with prompts of these lengths."""
    buckets = {f"{edge}.0": sum(each <= edge for each in lengths) for edge in EDGES}
    prompts = Histogram(
        count=len(lengths), total=sum(lengths), buckets={**buckets, "+Inf": len(lengths)}
    )
    made = PodCounters(
        pod=f"{release}-0", release_id=release, started_at=NOW, prompts=prompts, in_flight=in_flight
    )
    return made.model_copy(update=changes)


def look(seconds: float, *pods: PodCounters, **weights: int) -> Snapshot:
    shares = {OLD: weights.get("old", 90), NEW: weights.get("new", 10)}
    return Snapshot(
        at=NOW + timedelta(seconds=seconds),
        phase="holding",
        step_index=0,
        pods=pods,
        route=RouteCounters(epoch="1", weights=shares, releases={}),
    )


def found(*looks: Snapshot, envelope: Envelope = ENVELOPE) -> dict[str, str]:
    return {each.kind: each.why for each in beyond_envelope(envelope, looks)}


def test_traffic_like_the_measured_one_is_within() -> None:
    lengths = [16, 100, 480] * 30
    assert found(look(0, pod()), look(60, pod(*lengths, in_flight=16))) == {}
    assert found(look(0, pod())) == {}
    assert found() == {}


def test_longer_prompts_are_counted_from_the_first_edge_above_the_longest() -> None:
    lengths = [100] * 90 + [600] * 10
    told = found(look(0, pod()), look(60, pod(*lengths)))
    assert told == {
        "prompts": "at least 10% of the newest 100 prompts are longer: the longest that was "
        "measured has 480 tokens"
    }


def test_a_prompt_that_an_edge_does_not_prove_longer_is_not_called_longer() -> None:
    assert found(look(0, pod()), look(60, pod(*[485] * 100))) == {}, "the next edge is 500"
    tight = ENVELOPE.model_copy(update={"input_tokens": (16, 500)})
    # A server adds the beginning of the text, which a benchmark does not count.
    assert found(look(0, pod()), look(60, pod(*[501] * 100)), envelope=tight) == {}


def test_an_odd_long_prompt_is_no_finding() -> None:
    assert found(look(0, pod()), look(60, pod(*[100] * 99, 600))) == {}


def test_without_edges_the_average_tells() -> None:
    def bare(*lengths: int) -> PodCounters:
        return pod(prompts=Histogram(count=len(lengths), total=sum(lengths)))

    told = found(look(0, bare()), look(60, bare(*[900] * 50)))
    assert told["prompts"].startswith("the newest 50 prompts have 900 tokens on average")
    assert found(look(0, bare()), look(60, bare(*[400] * 50))) == {}


def test_only_the_newest_prompts_count() -> None:
    early = [600] * 100
    looks = [
        look(0, pod()),
        look(60, pod(*early)),
        look(60 + WINDOW_S, pod(*early, *[100] * 100)),
    ]
    assert "prompts" in found(*looks[:2])
    assert found(*looks) == {}


def test_a_server_with_more_in_hand_than_was_measured_is_named() -> None:
    told = found(look(0, pod(in_flight=17), pod(release=NEW, in_flight=3)))
    assert told == {"concurrency": f"{OLD}-0 has 17 requests in hand, and 16 at once were measured"}


def test_a_rate_must_be_surely_higher() -> None:
    assert found(look(0, pod()), look(10, pod(*[100] * 50))) == {}, "5 a second by chance"
    told = found(look(0, pod()), look(100, pod(*[100] * 500)))
    assert told == {"rate": f"{OLD}-0 answers 5 requests a second, and 4 were measured"}
    unknown = ENVELOPE.model_copy(update={"max_requests_per_s": 0.0})
    assert found(look(0, pod()), look(100, pod(*[100] * 500)), envelope=unknown) == {}


def test_what_is_not_shown_is_not_compared() -> None:
    silent = pod(in_flight=None, prompts=None)
    assert found(look(0, silent), look(60, silent)) == {}
    assert found(look(0, pod()), look(60)) == {}
    long = [600] * 100
    again = pod(*long, started_at=NOW + timedelta(seconds=30))
    assert found(look(0, pod(100)), look(60, again)) == {}, "another start of the server"
    assert found(look(0, pod(*long, *long)), look(60, pod(*long))) == {}, "counters went back"


def test_requests_that_warm_a_server_up_are_our_own() -> None:
    looks = [
        look(0, pod(release=NEW), new=0, old=100),
        look(60, pod(*[600] * 100, release=NEW, in_flight=40), new=0, old=100),
    ]
    assert found(*looks) == {}
    # They came before the candidate had traffic.
    assert found(*looks, look(70, pod(*[600] * 100, *[100] * 20, release=NEW))) == {}
    nobody = looks[1].model_copy(update={"route": None})
    assert found(looks[0], nobody) == {}


def test_people_are_told_once_of_each_kind_and_the_newest_figures_stay() -> None:
    channel = requested(used_channel(), make_plan(envelope=ENVELOPE))
    for seconds, event in (
        (30, TrafficBeyond("prompts", "at least 10 %")),
        (40, TrafficBeyond("prompts", "at least 12 %")),
        (50, TrafficBeyond("concurrency", "17 in hand")),
    ):
        channel = step(channel, event, NOW + timedelta(seconds=seconds))[0]
    assert channel.rollout is not None
    assert [(each.kind, each.why) for each in channel.rollout.beyond] == [
        ("prompts", "at least 12 %"),
        ("concurrency", "17 in hand"),
    ]
    assert channel.rollout.beyond[0].since == NOW + timedelta(seconds=30)
    told = [one.entry for one in commands_for(channel, NOW) if isinstance(one, Notify)]
    assert [entry.detail for entry in told if entry.event == "beyond_envelope"] == [
        {"kind": "prompts", "why": "at least 10 %"},
        {"kind": "concurrency", "why": "17 in hand"},
    ]
    assert (channel.rollout.phase, channel.rollout.outcome) == ("deploying", None)


@pytest.mark.parametrize("ended", [False, True])
def test_a_rollout_that_ends_or_is_not_there_notes_nothing(ended: bool) -> None:
    channel = used_channel()
    if ended:
        channel = requested(channel, make_plan())
        channel = step(channel, AbortRequested("Enough."), NOW)[0]
    assert step(channel, TrafficBeyond("rate", "5 a second"), NOW)[0] == channel
