"""Whole rollouts: the real state machine, driver, judge and guard in a simulated world.

Only servers, requests and time are simulated. Requests have random latencies; the seeds are fixed.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.rollout_world import ENVIRONMENT, MODEL, Behaviour, World, driven, release_id
from tests.unit.yard import measurement

from trainyard.documents.channel import Channel
from trainyard.documents.look import Histogram, Look, PodCounters
from trainyard.documents.measurement import Envelope
from trainyard.errors import BadInput, Busy, NotFound, Refused, Transient
from trainyard.releases import list_attestations
from trainyard.rollout.by_hand import promote_now
from trainyard.rollout.channel_store import change_channel, reset_channel, write_channel
from trainyard.rollout.driver import abort, tidy
from trainyard.rollout.events import Adopted, DriverClaimed
from trainyard.rollout.judge import judge
from trainyard.rollout.looks import LookLog
from trainyard.rollout.outbox import RolloutEvent
from trainyard.rollout.rollouts import Rollouts
from trainyard.rollout.slices import blocks_from_snapshots
from trainyard.rollout.state_machine import step
from trainyard.serving.protocol import ServerStatus
from trainyard.spec.environments import Environment
from trainyard.spec.loader import load_environments
from trainyard.store.documents import read_document
from trainyard.store.folder import FolderStore
from trainyard.store.layout import channel_key

pytestmark = pytest.mark.integration

OTHER = DriverClaimed("another run")


@pytest.fixture
def world() -> World:
    """A world whose channel has the stable release `a`."""
    made = World()
    made.publish("a")
    assert made.run(made.promote(release_id("a"), run_id="first")).outcome == "promoted"
    made.said.clear()
    made.told.clear()
    return made


def stable_of(world: World) -> str:
    stable = world.channel.stable
    assert stable is not None
    return stable.release_id


def looks_of(world: World) -> list[Look]:
    rollout = world.channel.rollout
    assert rollout is not None
    return LookLog(world.store).read(MODEL, ENVIRONMENT, rollout.number)


def at_phase(name: str) -> Any:
    return lambda channel: channel.rollout is not None and channel.rollout.phase == name


def test_autoscalers_rest_while_two_releases_are_compared(world: World) -> None:
    b = world.publish("b")
    assert world.autoscaling == release_id("a")
    result = world.run(world.promote(b), until=at_phase("holding"))
    assert world.autoscaling == "held"
    assert result is not None
    world.run(world.promote(b))
    assert world.autoscaling == b


# --- the ways a promotion can end -----------------------------------------------------------------


def test_a_first_release_gets_all_traffic_after_its_warm_up() -> None:
    world = World()
    a = world.publish("a")
    result = world.run(world.promote(a))
    assert result.outcome == "promoted"
    world.advance(2)
    assert world.effective == {a: 100}
    assert [s.state for s in world.servers_of(a)] == ["ready"]
    assert not world.lease_alive()


def test_a_first_release_that_fails_requests_is_rejected() -> None:
    world = World()
    a = world.publish("a", behaviour=Behaviour(error_share=0.05))
    result = world.run(world.promote(a))
    assert result.outcome == "rolled_back"
    assert "requests failed" in result.summary
    assert world.channel.stable is None
    world.advance(5)
    assert world.servers == {}


@pytest.mark.parametrize("seed", range(3))
def test_a_good_release_is_promoted_step_by_step(seed: int) -> None:
    world = World(seed=seed)
    a, b = world.publish("a"), world.publish("b")
    world.run(world.promote(a, run_id="first"))
    weights: list[int] = []
    tick = world.promote(b, run_id="second")

    def note(channel: Channel) -> bool:
        if not weights or weights[-1] != channel.weights.candidate:
            weights.append(channel.weights.candidate)
        return False

    result = world.run(tick, until=note)
    assert result.outcome == "promoted"
    assert weights == [0, 10, 50, 10, 0]
    channel = world.channel
    assert stable_of(world) == b
    assert [track.release_id for track in channel.previous] == [a]
    world.advance(5)
    assert world.effective == {b: 100}
    assert world.servers_of(a) == []
    (promotion,) = list_attestations(world.store, MODEL, b, "promotion")
    assert "Good enough in every metric" in promotion.subject["reason"]
    assert sum(world.errors.values()) == 0


@pytest.mark.parametrize(
    ("behaviour", "metric"),
    [
        (Behaviour(ttft_s=0.07), "ttft"),
        (Behaviour(tpot_s=0.01), "tpot"),
        (Behaviour(error_share=0.1), "errors"),
        (Behaviour(cut_share=0.5), "truncated"),
    ],
)
def test_a_harmful_release_is_rolled_back_and_rejected(
    world: World, behaviour: Behaviour, metric: str
) -> None:
    b = world.publish("b", behaviour=behaviour)
    result = world.run(world.promote(b))
    assert result.outcome == "rolled_back"
    assert metric in result.summary
    assert stable_of(world) == release_id("a")
    (rejection,) = world.channel.rejected
    evidence = read_document(world.store, rejection.evidence_key, Look)
    assert evidence.verdict is not None
    assert evidence.verdict.outcome == "HARM"
    assert evidence.verdict.reason == rejection.reason
    (attestation,) = list_attestations(world.store, MODEL, b, "rejection")
    assert attestation.subject["evidence"] == rejection.evidence_key
    world.advance(5)
    assert world.effective == {release_id("a"): 100}
    assert world.servers_of(b) == []
    with pytest.raises(Refused, match="was rejected in production"):
        world.promote(b, run_id="again")


@pytest.mark.parametrize("longest", [480, 1000, None])
def test_traffic_beyond_what_was_measured_is_said_and_stops_nothing(
    world: World, longest: int | None
) -> None:
    """None: the measurement is of an earlier version and has no envelope."""
    envelope = longest and Envelope(
        input_tokens=(16, longest),
        output_tokens=(1, 64),
        max_concurrency=16,
        max_requests_per_s=100.0,
    )
    found = measurement("measurement", envelope=envelope or None)
    world.store.put("measurements/measurement.json", found.to_bytes())

    def asked(pod: PodCounters) -> PodCounters:
        count = pod.ttft.count if pod.ttft is not None else 0
        prompts = Histogram(
            count=count, total=600.0 * count, buckets={"500.0": 0, "1000.0": count, "+Inf": count}
        )
        return pod.model_copy(update={"prompts": prompts, "in_flight": 3})

    world.spoil = asked
    world.told.clear()
    result = world.run(world.promote(world.publish("b")))
    assert result.outcome == "promoted"
    events = [entry for entry in world.channel.history if entry.event == "beyond_envelope"]
    assert [entry.detail["kind"] for entry in events] == ["prompts"] * (longest == 480)
    assert sum("beyond what" in line for line in world.told) == (longest == 480)
    rollout = world.channel.rollout
    assert rollout is not None
    assert all("100% of the newest" in each.why for each in rollout.beyond)


def test_the_evidence_gives_the_same_verdict_again(world: World) -> None:
    b = world.publish("b", behaviour=Behaviour(ttft_s=0.07))
    world.run(world.promote(b))
    rollout = world.channel.rollout
    assert rollout is not None
    assert rollout.exposed_since is not None
    looks = looks_of(world)
    assert [look.slot for look in looks] == sorted({look.slot for look in looks})
    blocks = blocks_from_snapshots(
        [look.snapshot for look in looks],
        exposed_since=rollout.exposed_since,
        candidate=rollout.release_id,
        stable=rollout.reference_id,
    )
    assert judge(blocks, rollout.plan.judge) == looks[-1].verdict == rollout.verdict


def test_harm_that_shows_in_the_bake_is_rolled_back(world: World) -> None:
    b = world.publish("b", bake_s=300)
    tick = world.promote(b)
    world.run(tick, until=at_phase("baking"))
    assert stable_of(world) == b
    world.advance(5)
    assert world.effective == {b: 90, release_id("a"): 10}
    world.behaviour[b].error_share = 0.1
    result = world.run(tick)
    assert result.outcome == "rolled_back"
    assert stable_of(world) == release_id("a")
    assert world.channel.rejected[0].release_id == b
    world.advance(5)
    assert world.effective == {release_id("a"): 100}
    assert world.servers_of(b) == []


@pytest.mark.parametrize("error_share", [0.0, 0.5])
def test_a_bake_that_nobody_drove_is_not_taken_for_passed(world: World, error_share: float) -> None:
    world.publish("b", holdback_weight=0)
    world.run(world.promote(release_id("b")), until=lambda c: c.rollout.phase == "baking")
    world.behaviour[release_id("b")].error_share = error_share
    world.advance(300)
    outcome = world.run(world.promote(release_id("b"))).outcome
    assert outcome == ("rolled_back" if error_share else "promoted")
    assert "bake_anew" in [entry.event for entry in world.channel.history]


@pytest.mark.parametrize("watches", [False, True])
def test_a_store_that_is_not_mounted_ends_no_rollout(tmp_path: Path, watches: bool) -> None:
    root, away = tmp_path / "store", tmp_path / "away"
    world = World(store=FolderStore(root))
    world.store.put("releases/adder/a.json", b"{}")
    world.publish("a")
    assert world.run(world.promote(release_id("a"))).outcome == "promoted"
    b = world.publish("b")
    tick = world.promote(b)
    world.run(tick, until=at_phase("holding"))
    if watches:
        change_channel(world.store, MODEL, ENVIRONMENT, lambda c: step(c, OTHER, world.now)[0])
        assert not tick().done
    root.rename(away)
    for _ in range(2):
        with pytest.raises(Transient, match=rf"channels/{MODEL}/{ENVIRONMENT}.json is gone"):
            tick()
        # What cannot begin is tried again, and a run that ends does not forget its rollout.
        with pytest.raises(Transient, match="does not exist"):
            world.promote(b)
        with pytest.raises(Transient, match="does not exist"):
            world.roll_back()
        with pytest.raises(Transient, match="does not exist"):
            Rollouts(world.deps()).settle(model=MODEL, environment=ENVIRONMENT, run_id="run")
    assert not root.exists(), "nothing is written where the store should be"
    away.rename(root)
    if not watches:
        assert world.run(tick).outcome == "promoted"
    else:
        assert not tick().done


def test_a_channel_that_was_reset_is_waited_for_no_longer(world: World) -> None:
    tick = world.promote(world.publish("b"))
    change_channel(world.store, MODEL, ENVIRONMENT, lambda c: step(c, OTHER, world.now)[0])
    empty = Channel(model=MODEL, environment=ENVIRONMENT, generation=world.channel.generation + 1)
    world.store.put(channel_key(MODEL, ENVIRONMENT), empty.to_bytes())
    assert "the channel was reset" in tick().summary


@pytest.mark.parametrize("away_s", [90.0, 900.0])
def test_a_first_release_that_failed_while_nobody_drove_is_rejected(away_s: float) -> None:
    world = World()
    world.publish("a", behaviour=Behaviour(error_share=1.0))
    world.run(world.promote(release_id("a")), until=lambda c: c.rollout.phase == "baking")
    world.advance(away_s)
    assert world.run(world.promote(release_id("a"))).outcome == "rolled_back"


def test_a_busier_server_is_not_blamed_for_its_load_in_the_bake(world: World) -> None:
    """In the bake the new release has nine times the load of the old one, and shows it."""
    b = world.publish("b", bake_s=300)
    tick = world.promote(b)
    world.run(tick, until=at_phase("baking"))
    world.behaviour[b].ttft_s *= 2
    assert world.run(tick).outcome == "promoted"


def test_an_undecided_release_is_held_and_then_withdrawn(world: World) -> None:
    """Nearly no requests, so there is nearly no evidence; that never promotes."""
    b = world.publish("b")
    world.rate = 0.2
    result = world.run(world.promote(b))
    assert result.outcome == "withdrawn"
    assert any("undecided after 600 s" in line for line in world.said)
    assert any("undecided after 600 s" in line for line in world.told)
    assert world.channel.rejected == ()
    assert stable_of(world) == release_id("a")


def test_evidence_that_comes_during_the_hold_still_promotes(world: World) -> None:
    b = world.publish("b")
    tick = world.promote(b)
    world.run(tick, until=lambda c: c.weights.candidate == 50)
    world.rate = 0.0
    world.run(tick, until=lambda c: c.rollout is not None and c.rollout.held_since is not None)
    assert world.channel.weights.candidate == 50
    world.rate = 40.0
    assert world.run(tick).outcome == "promoted"


def test_a_service_without_requests_promotes_nothing(world: World) -> None:
    world.rate = 0.0
    b = world.publish("b")
    result = world.run(world.promote(b))
    assert result.outcome == "withdrawn"
    assert "no evidence" in result.summary


def test_a_candidate_that_crashes_blows_the_fuse(world: World) -> None:
    b = world.publish("b")
    tick = world.promote(b)
    world.run(tick, until=at_phase("holding"))
    world.crash(f"{b}-0")
    world.advance(1)
    assert world.effective == {release_id("a"): 100, b: 0}
    result = world.run(tick)
    assert result.outcome == "rolled_back"
    assert "no ready server" in world.channel.rejected[0].reason


def failed_in(world: World, seconds: float) -> int:
    """Let time pass and return how many requests failed in it."""
    before = sum(world.errors.values())
    world.advance(seconds)
    return sum(world.errors.values()) - before


@pytest.mark.parametrize("withdrawn", [False, True], ids=["goes on", "withdrawn"])
def test_the_only_release_that_answers_goes_on_until_stable_is_back(
    world: World, withdrawn: bool
) -> None:
    a, b = release_id("a"), release_id("b")
    world.publish("b", max_duration_s=5000.0)
    tick = world.promote(b)
    world.run(tick, until=lambda channel: channel.rollout.phase == "holding")
    for server in world.servers_of(a):
        server.state = "failed"
    world.advance(2)
    if withdrawn:
        abort(world.deps(), MODEL, ENVIRONMENT, reason="Too late at night.")
    for _ in range(1500):
        assert failed_in(world, 1.0) == 0
        tick()
    assert world.effective == {a: 0, b: 100}
    assert "stable_down" in [entry.event for entry in world.channel.history]
    for server in world.servers_of(a):
        world.crash(server.name)
    assert world.run(tick).outcome == ("withdrawn" if withdrawn else "promoted")
    assert failed_in(world, 10.0) == 0
    assert stable_of(world) == (a if withdrawn else b)


def test_a_person_may_keep_the_only_release_that_answers(world: World) -> None:
    world.publish("b", max_duration_s=5000.0)
    tick = world.promote(release_id("b"))
    world.run(tick, until=lambda channel: channel.rollout.phase == "holding")
    for server in world.servers_of(release_id("a")):
        server.state = "failed"
    world.advance(2)
    tick()
    promote_now(driven(world, tick), MODEL, ENVIRONMENT, reason="Its nodes are gone.", who="ann")
    assert world.run(tick).outcome == "promoted"
    assert failed_in(world, 10.0) == 0
    assert stable_of(world) == release_id("b")


def test_a_candidate_whose_first_answers_all_fail_blows_the_fuse(world: World) -> None:
    b = world.publish("b", behaviour=Behaviour(error_share=1.0))
    result = world.run(world.promote(b))
    assert result.outcome == "rolled_back"
    assert "first 10 requests" in world.channel.rejected[0].reason
    assert world.errors[b] < 40


@pytest.mark.parametrize(
    ("behaviour", "outcome"),
    [(Behaviour(refuses=True), "rolled_back"), (Behaviour(mute=True), "withdrawn")],
)
def test_a_release_that_cannot_warm_up_gets_no_traffic(
    world: World, behaviour: Behaviour, outcome: str
) -> None:
    b = world.publish("b", behaviour=behaviour)
    assert world.run(world.promote(b)).outcome == outcome
    assert world.arrivals.get(b, 0) == 0


def test_a_route_that_does_not_follow_ends_the_rollout(world: World) -> None:
    b = world.publish("b")
    world.router_frozen = True
    result = world.run(world.promote(b))
    assert result.outcome == "withdrawn"
    assert "did not take the weights" in result.summary


def test_an_abort_sends_traffic_back_at_once(world: World) -> None:
    b = world.publish("b")
    tick = world.promote(b)
    world.run(tick, until=at_phase("holding"))
    channel = abort(world.deps(), MODEL, ENVIRONMENT, reason="ann wants it", who="ann")
    assert channel.weights.candidate == 0
    world.advance(1)
    assert world.effective == {release_id("a"): 100, b: 0}
    result = world.run(tick)
    assert (result.outcome, world.channel.rejected) == ("withdrawn", ())
    with pytest.raises(NotFound, match="No rollout of adder is under way"):
        abort(world.deps(), MODEL, ENVIRONMENT, reason="again")


# --- more than one server -------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", ["surge", "replace"])
def test_several_servers_move_over_without_a_failed_request(capacity: str) -> None:
    world = World(rate=120.0)
    world.environments[ENVIRONMENT] = Environment(target="cpu", devices=6)
    steps = [{"weight": 25, "hold_s": 30}, {"weight": 50, "hold_s": 60}]
    a = world.publish("a", replicas=3, capacity=capacity, steps=steps)
    b = world.publish("b", replicas=3, capacity=capacity, steps=steps)
    world.run(world.promote(a, run_id="first"))
    assert len(world.servers_of(a)) == 3
    sizes: set[tuple[int, int]] = set()

    def note(channel: Channel) -> bool:
        ready = [
            sum(server.state == "ready" for server in world.servers_of(name)) for name in (a, b)
        ]
        sizes.add((ready[0], ready[1]))
        return False

    result = world.run(world.promote(b), until=note)
    assert result.outcome == "promoted"
    world.advance(20)
    assert len(world.servers_of(b)) == 3
    assert world.servers_of(a) == []
    assert sum(world.errors.values()) == 0
    most = max(old + new for old, new in sizes)
    assert most == (6 if capacity == "surge" else 4)
    if capacity == "surge":
        assert {old for old, _ in sizes} <= {0, 3}


def test_single_takes_the_service_down_only_for_the_start() -> None:
    world = World()
    world.environments[ENVIRONMENT] = Environment(target="cpu", devices=1, allow_downtime=True)
    a, b = (world.publish(name, capacity="single") for name in ("a", "b"))
    world.run(world.promote(a, run_id="first"))
    result = world.run(world.promote(b))
    assert result.outcome == "promoted"
    world.advance(2)
    assert world.effective == {b: 100}
    assert world.servers_of(a) == []


def test_single_brings_the_old_release_back_if_the_new_one_fails() -> None:
    world = World()
    world.environments[ENVIRONMENT] = Environment(target="cpu", devices=1, allow_downtime=True)
    a = world.publish("a", capacity="single")
    b = world.publish("b", capacity="single", behaviour=Behaviour(error_share=0.2))
    world.run(world.promote(a, run_id="first"))
    result = world.run(world.promote(b))
    assert result.outcome == "rolled_back"
    assert stable_of(world) == a
    assert [server.state for server in world.servers_of(a)] == ["ready"]
    assert world.servers_of(b) == []


# --- going back -----------------------------------------------------------------------------------


def promote_b(world: World, **settings: Any) -> str:
    b = world.publish("b", **settings)
    assert world.run(world.promote(b, run_id="second")).outcome == "promoted"
    return b


def test_a_rollback_starts_the_old_servers_and_moves_the_traffic(world: World) -> None:
    b = promote_b(world)
    result = world.run(world.roll_back(reason="odd answers", requested_by="ann"))
    assert result.outcome == "promoted"
    a = release_id("a")
    assert stable_of(world) == a
    world.advance(5)
    assert world.effective == {a: 100}
    assert world.servers_of(b) == []
    assert world.channel.previous == ()
    assert world.channel.rejected == ()
    assert sum(world.errors.values()) == 0
    with pytest.raises(NotFound, match="no earlier release to go back to"):
        world.roll_back(run_id="further")


def test_a_rollback_without_room_for_both_keeps_enough_servers() -> None:
    world = World(rate=40)
    world.environments = {ENVIRONMENT: Environment(target="cpu", devices=5, capacity="surge")}
    for name in ("a", "b"):
        world.publish(name, replicas=4, capacity="replace", deploy_timeout_s=1000.0)
    world.run(world.promote(release_id("a"), run_id="first"))
    tick = world.promote(release_id("b"))
    world.run(tick, until=lambda channel: channel.rollout.phase == "holding")
    promote_now(driven(world, tick), MODEL, ENVIRONMENT, reason="Needed.", who="ann")
    assert world.run(tick).outcome == "promoted"
    world.behaviour[release_id("a")].start_s = 60.0
    tick = world.roll_back(release_id("a"))
    while not tick().done:
        ready = {
            release: sum(s.state == "ready" for s in world.servers_of(release))
            for release, share in world.effective.items()
            if share
        }
        assert sum(ready.values()) >= 4, "less than what carried all traffic before"
        world.advance(0.5)
    assert stable_of(world) == release_id("a")
    assert [s.state for s in world.servers_of(release_id("a"))] == ["ready"] * 4
    assert sum(world.errors.values()) == 0


def test_a_rollback_to_warm_servers_takes_one_tick(world: World) -> None:
    world.environments[ENVIRONMENT] = Environment(target="cpu", devices=2, rollback_window_s=600)
    b = promote_b(world)
    a = release_id("a")
    assert [server.state for server in world.servers_of(a)] == ["ready"]
    tick = world.roll_back()
    tick()
    assert stable_of(world) == a
    world.advance(1)
    assert world.effective.get(a) == 100
    assert world.run(tick).outcome == "promoted"
    world.advance(5)
    assert world.servers_of(b) == []


def test_warm_servers_go_when_their_time_is_over(world: World) -> None:
    world.environments[ENVIRONMENT] = Environment(target="cpu", devices=2, rollback_window_s=600)
    promote_b(world)
    assert tidy(world.deps(), MODEL, ENVIRONMENT) == ()
    world.advance(601)
    assert tidy(world.deps(), MODEL, ENVIRONMENT) == (release_id("a"),)
    world.advance(5)
    assert world.servers_of(release_id("a")) == []


def test_a_rollback_ends_a_promotion_that_is_under_way(world: World) -> None:
    b = world.publish("b")
    promotion = world.promote(b, run_id="second")
    world.run(promotion, until=at_phase("holding"))
    tick = world.roll_back(requested_by="ann")
    assert world.channel.weights.candidate == 0
    result = world.run(tick)
    assert result.outcome == "promoted"
    assert stable_of(world) == release_id("a")
    assert promotion().outcome == "withdrawn"
    settled = Rollouts(world.deps()).settle(
        model=MODEL, environment=ENVIRONMENT, run_id="second", release_id=b
    )
    assert settled.outcome == "withdrawn"
    assert "A rollback was requested" in settled.summary


def test_a_rollback_during_the_bake_swaps_the_roles_back(world: World) -> None:
    b = world.publish("b")
    world.run(world.promote(b, run_id="second"), until=at_phase("baking"))
    result = world.run(world.roll_back())
    assert result.outcome == "promoted"
    assert stable_of(world) == release_id("a")
    assert world.servers_of(b) == []


def test_a_rollback_before_the_old_servers_have_gone_starts_nothing(world: World) -> None:
    world.publish("b")
    world.behaviour[release_id("a")].start_s = 600.0
    world.run(world.promote(release_id("b")), until=lambda c: c.rollout.ending == "promoted")
    asked = world.now
    tick = world.roll_back(run_id="back")
    assert stable_of(world) == release_id("a")
    world.run(tick)
    assert world.channel.rollout is not None
    assert world.channel.rollout.outcome == "withdrawn"
    assert world.effective[release_id("a")] == 100
    assert (world.now - asked).total_seconds() < 60
    assert stable_of(world) == release_id("a")
    assert world.channel.rejected == ()


def test_a_rollback_to_a_named_release_goes_on_after_ending_the_promotion(world: World) -> None:
    promote_b(world)
    c = world.publish("c")
    world.run(world.promote(c, run_id="third"), until=at_phase("holding"))
    tick = world.roll_back(release_id("a"))
    assert stable_of(world) == release_id("b")
    result = world.run(tick)
    assert result.outcome == "promoted"
    assert stable_of(world) == release_id("a")
    assert world.channel.previous == ()
    assert world.run(world.roll_back(release_id("a"))).outcome == "promoted"
    assert world.channel.rollout is not None
    assert world.channel.rollout.number == 4


def test_a_rollback_that_is_repeated_by_its_run_does_not_go_further_back(world: World) -> None:
    promote_b(world)
    c = world.publish("c")
    assert world.run(world.promote(c, run_id="third")).outcome == "promoted"
    assert world.run(world.roll_back()).outcome == "promoted"
    assert stable_of(world) == release_id("b")
    assert world.run(world.roll_back()).outcome == "promoted"
    assert stable_of(world) == release_id("b")


def test_a_rollback_without_a_name_undoes_a_promotion_and_nothing_else(world: World) -> None:
    a, b = release_id("a"), promote_b(world)
    c = world.publish("c")
    assert world.run(world.promote(c, run_id="third")).outcome == "promoted"
    assert world.run(world.roll_back(run_id="ann")).outcome == "promoted"
    before = world.channel
    with pytest.raises(Refused, match="no promotion to undo") as refused:
        world.roll_back(run_id="bob")
    assert f"name that one: --to {a} (in Airflow: release)" in refused.value.hint
    assert world.channel == before
    assert stable_of(world) == b
    assert world.run(world.roll_back(a, run_id="cid")).outcome == "promoted"
    assert stable_of(world) == a


def test_nor_does_it_leave_a_release_to_which_the_judge_went_back(world: World) -> None:
    b = promote_b(world)
    bad = world.publish("bad", behaviour=Behaviour(error_share=0.3))
    assert world.run(world.promote(bad, run_id="third")).outcome == "rolled_back"
    with pytest.raises(Refused, match="no promotion to undo"):
        world.roll_back(run_id="ann")
    assert stable_of(world) == b


def test_a_first_release_has_nothing_to_go_back_to() -> None:
    world = World()
    a = world.publish("a")
    world.run(world.promote(a), until=at_phase("baking"))
    with pytest.raises(NotFound, match="abort it"):
        world.roll_back()
    assert world.channel.in_progress


def test_two_rollbacks_do_not_meet(world: World) -> None:
    promote_b(world)
    world.roll_back()
    with pytest.raises(Busy, match=r"A rollback to .* is under way already"):
        world.roll_back(run_id="other")


# --- requests -------------------------------------------------------------------------------------


def test_a_check_says_what_would_happen_and_touches_nothing(world: World) -> None:
    b = world.publish("b")
    rollouts = Rollouts(world.deps())
    before = world.channel

    def check(name: str, **request: Any) -> str:
        return rollouts.check(
            model=MODEL, environment=ENVIRONMENT, release_id=name, run_id="run", **request
        )

    assert "10 % for 30 s, 50 % for 60 s" in check(b)
    assert "is the stable release of production already" in check(release_id("a"))
    with pytest.raises(NotFound):
        check(release_id("nobody"))
    assert world.channel == before


def test_the_stable_release_has_nothing_to_do(world: World) -> None:
    before = world.channel
    result = world.run(world.promote(release_id("a"), run_id="again"))
    assert (result.done, result.outcome) == (True, "promoted")
    assert "nothing to do" in result.summary
    assert world.channel == before


def test_another_run_has_to_wait(world: World) -> None:
    b, c = world.publish("b"), world.publish("c")
    world.promote(b, run_id="one")
    for name in (b, c):
        with pytest.raises(Busy, match="driven by one"):
            world.promote(name, run_id="two")


def test_an_environment_that_does_not_exist_is_named(world: World) -> None:
    with pytest.raises(NotFound, match="There is no environment nowhere"):
        Rollouts(world.deps()).check(model=MODEL, environment="nowhere", release_id=release_id("a"))


def test_a_promotion_needs_a_release(world: World) -> None:
    with pytest.raises(BadInput, match="No release of adder was named"):
        world.promote("")


def test_staging_comes_first_where_it_is_required(world: World) -> None:
    world.environments[ENVIRONMENT] = Environment(
        target="cpu", devices=2, requires=("staging",), soak_s=60
    )
    b = world.publish("b")
    with pytest.raises(Refused, match="promoted to staging first"):
        world.promote(b)


# --- records --------------------------------------------------------------------------------------


def test_every_event_is_kept_and_told_once(world: World) -> None:
    b = world.publish("b")
    world.run(world.promote(b))
    rollout = world.channel.rollout
    assert rollout is not None
    folder = f"rollouts/{MODEL}/{ENVIRONMENT}/{rollout.number}/events"
    events = [
        read_document(world.store, entry.key, RolloutEvent) for entry in world.store.list(folder)
    ]
    names = [event.entry.event for event in sorted(events, key=lambda e: e.entry.generation)]
    assert names[0] == "rollout_started"
    assert names[-1] == "promoted"
    assert sorted(world.told) == sorted(f"{MODEL}/{ENVIRONMENT}: {e.message}" for e in events)


def test_looks_are_lines_that_people_can_read(world: World) -> None:
    b = world.publish("b")
    world.run(world.promote(b))
    lines = [line for line in world.said if line.startswith("look ")]
    assert len(lines) >= 8
    assert any(" at 10 %: ttft " in line for line in lines)
    assert any(" at 50 %: ttft " in line and "evidence of harm" in line for line in lines)
    assert " at 90 %: " in lines[-1]


def test_stable_is_observed_before_the_candidate_is_exposed(world: World) -> None:
    b = world.publish("b", behaviour=Behaviour(start_s=25))
    world.run(world.promote(b), until=at_phase("holding"))
    rollout = world.channel.rollout
    assert rollout is not None
    assert rollout.exposed_since is not None
    early = [look for look in looks_of(world) if look.snapshot.at < rollout.exposed_since]
    assert len(early) >= 2
    assert {pod.release_id for look in early for pod in look.snapshot.pods} >= {release_id("a")}
    assert all(look.verdict is None for look in early)


def test_rollouts_are_numbered_on_after_a_reset(world: World) -> None:
    promote_b(world)
    assert world.channel.rollout is not None
    number = world.channel.rollout.number
    reset_channel(world.store, MODEL, ENVIRONMENT)
    world.advance(2)
    assert world.effective == {}
    c = world.publish("c")
    assert world.run(world.promote(c, run_id="after")).outcome == "promoted"
    assert world.channel.rollout is not None
    assert world.channel.rollout.number == number + 1
    assert world.channel.previous == ()
    world.advance(2)
    assert {server.release_id for server in world.servers.values()} == {c}


def test_servers_that_nobody_wants_are_removed_at_the_next_rollout(world: World) -> None:
    stray = world.publish("stray")
    world.wishes[stray] = 1
    world.advance(1)
    b = world.publish("b")
    world.run(world.promote(b))
    world.advance(2)
    assert world.servers_of(stray) == []


def test_a_stable_release_without_a_manifest_does_not_stand_in_the_way(world: World) -> None:
    """As after an adoption: nobody can deploy it again, but a canary beside it works."""
    b = world.publish("b")
    del world.releases[release_id("a")]
    result = world.run(world.promote(b))
    assert result.outcome == "promoted"
    assert any("DeployServers has to wait" in line for line in world.said)


def test_servers_keep_their_counters_apart(world: World) -> None:
    """A restart of a stable server during the canary costs a slice, not the rollout."""
    world.environments[ENVIRONMENT] = Environment(target="cpu", devices=4)
    b = world.publish("b")
    tick = world.promote(b)
    world.run(tick, until=at_phase("holding"))
    world.crash(f"{release_id('a')}-0")
    result = world.run(tick)
    assert result.outcome == "promoted"
    assert world.channel.rejected == ()


def test_a_lease_is_held_while_and_only_while_it_is_needed(world: World) -> None:
    b = world.publish("b")
    tick = world.promote(b)
    tick()
    assert world.lease_until == world.now + timedelta(seconds=120)
    world.run(tick)
    assert not world.lease_alive()


def test_a_rollout_keeps_the_settings_that_it_began_with(world: World, tmp_path: Path) -> None:
    """Another process goes on with it after the file and the settings have changed."""
    file = tmp_path / "environments.yaml"

    def driver(drain_timeout_s: float, **environment: Any) -> Rollouts:
        """Return what a process has that starts now."""
        rules = {"target": "cpu", **environment}
        made = {"schema": "trainyard/v1", "environments": {ENVIRONMENT: rules}}
        file.write_text(yaml.safe_dump(made), encoding="utf-8")
        found = load_environments(file).environments
        return Rollouts(world.deps(environments=found, drain_timeout_s=drain_timeout_s))

    def promote(drivers: Rollouts, name: str, run_id: str) -> Any:
        return drivers.begin(
            kind="promote",
            model=MODEL,
            environment=ENVIRONMENT,
            release_id=world.publish(name),
            run_id=run_id,
        )

    before = driver(20.0, devices=2, lease_s=200.0, rollback_window_s=50.0)
    world.run(promote(before, "b", "run"), until=at_phase("holding"))
    assert world.channel.rollout is not None
    pinned = world.channel.rollout.plan
    assert (pinned.capacity, pinned.lease_s) == ("surge", 200.0)
    assert (pinned.keep_warm_s, pinned.drain_timeout_s) == (50.0, 20.0)

    changed = driver(7.0, devices=1, capacity="single", lease_s=900.0, allow_downtime=True)
    tick = promote(changed, "b", "run")
    while not (result := tick()).done:
        assert result.channel.rollout is not None
        assert result.channel.rollout.plan == pinned
        assert world.lease_until is not None
        assert world.lease_until - world.now <= timedelta(seconds=200)
        world.advance(max(result.next_in_s, 0.1))
    assert result.outcome == "promoted"
    (old,) = world.channel.previous
    assert old.warm_until == world.channel.rollout.phase_since + timedelta(seconds=50)

    promote(changed, "c", "next")()
    following = world.channel.rollout.plan
    assert (following.lease_s, following.keep_warm_s, following.drain_timeout_s) == (
        900.0,
        0.0,
        7.0,
    )
    assert following.capacity == "single"


def test_the_world_gives_what_the_protocol_promises(world: World) -> None:
    (server,) = world.deps().host.servers(ENVIRONMENT, MODEL)
    assert isinstance(server, ServerStatus)
    assert (server.release_id, server.state) == (release_id("a"), "ready")


# --- servers that somebody else deployed ----------------------------------------------------------


@pytest.fixture
def joined() -> World:
    """A world whose stable release was adopted: it serves, and has no manifest."""
    world = World()
    adopted = release_id("theirs")
    world.behaviour[adopted] = Behaviour()
    world.wishes[adopted] = 1
    world.advance(60)
    write_channel(
        world.store,
        step(Channel(model=MODEL, environment=ENVIRONMENT), Adopted(adopted, "vllm"), world.now)[0],
        version=None,
    )
    return world


def test_an_adopted_release_is_compared_with_and_replaced(joined: World) -> None:
    new = joined.publish("new")
    result = joined.run(joined.promote(new))
    assert result.outcome == "promoted"
    assert stable_of(joined) == new
    assert [(t.release_id, t.verified) for t in joined.channel.previous] == [
        (release_id("theirs"), False)
    ]
    assert not [line for line in joined.said if "has to wait" in line]


def test_traffic_goes_back_to_an_adopted_release(joined: World) -> None:
    new = joined.publish("new")
    joined.run(joined.promote(new))
    result = joined.run(joined.roll_back(run_id="back"))
    assert result.outcome == "promoted"
    assert stable_of(joined) == release_id("theirs")
    assert joined.channel.stable is not None
    assert not joined.channel.stable.verified
    assert not [line for line in joined.said if "has to wait" in line]
