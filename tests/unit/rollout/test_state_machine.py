"""Every transition of the rollout's state machine, one at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import pytest
from tests.rollout_world import release_id
from tests.unit.rollout.machine import (
    NEW,
    NOW,
    OLD,
    empty_channel,
    make_plan,
    make_verdict,
    requested,
    route,
    servers,
    used_channel,
)

from trainyard.documents.channel import (
    HISTORY_LIMIT,
    PAUSE_LIMIT,
    WAITING_LIMIT,
    Channel,
    Rejection,
    Rollout,
    Track,
    Weights,
)
from trainyard.documents.evidence import JudgeSpec, MetricVerdict, Verdict, default_metrics
from trainyard.rollout.events import (
    AbortRequested,
    Attest,
    Command,
    ControllerLost,
    DeployServers,
    DriverClaimed,
    Event,
    FuseBlown,
    HoldAutoscaling,
    Looked,
    Notify,
    OutcomeNoted,
    PauseRequested,
    PromotionForced,
    QueueJoined,
    QueueLeft,
    ReleaseLease,
    RemoveServers,
    RenewLease,
    RequesterNoted,
    ResumeAutoscaling,
    ResumeRequested,
    RolloutRequested,
    ServerSeen,
    ServersSeen,
    Sighted,
    TimePassed,
    UndoRequested,
    WarmedUp,
    WarmUp,
)
from trainyard.rollout.state_machine import (
    commands_for,
    pause_refusal,
    place_in_line,
    promotion_refusal,
    resume_refusal,
    step,
)
from trainyard.spec.model import RolloutStep

pytestmark = pytest.mark.usefixtures("only_drawn_edges")

WARM = f"{NEW}-0@{NOW.isoformat()}"


@dataclass
class Run:
    """A rollout under test, with a clock."""

    channel: Channel
    now: datetime = NOW
    commands: tuple[Command, ...] = field(default=())

    def on(self, event: Event, *, after_s: float = 0.0) -> Run:
        """Let an event happen some time later."""
        self.now += timedelta(seconds=after_s)
        self.channel, self.commands = step(self.channel, event, self.now)
        return self

    @property
    def rollout(self) -> Rollout:
        assert self.channel.rollout is not None
        return self.channel.rollout

    @property
    def phase(self) -> str:
        return self.rollout.phase

    @property
    def weight(self) -> int:
        return self.channel.weights.candidate

    def events(self) -> list[str]:
        return [entry.event for entry in self.channel.history]

    def wanted(self) -> dict[str, int]:
        """Servers that are wished for by release."""
        wishes = {c.release_id: c.replicas for c in self.commands if isinstance(c, DeployServers)}
        gone = {c.release_id: 0 for c in self.commands if isinstance(c, RemoveServers)}
        assert not set(wishes) & set(gone)
        return {**wishes, **gone}


def canary(**changes: Any) -> Run:
    """Return a canary that has just been requested."""
    return Run(requested(used_channel(), make_plan(**changes)))


def warming(**changes: Any) -> Run:
    return canary(**changes).on(servers(old="ready", new="ready"))


def shifting(**changes: Any) -> Run:
    """Return a canary whose first weight is wished for."""
    run = warming(**changes).on(WarmedUp(WARM, asked=3, answered=3))
    return run.on(servers(old="ready", new="ready"))


def arrive(run: Run, *, total: int = 200, after_s: float = 1.0) -> Run:
    """Let the route take the weights and requests arrive accordingly."""
    weights = {"old": 100 - run.weight, "new": run.weight}
    run.on(route(weights, {"old": 0, "new": 0}))
    arrived = {"old": total * (100 - run.weight) // 100, "new": total * run.weight // 100}
    return run.on(route(weights, arrived), after_s=after_s)


def holding(**changes: Any) -> Run:
    """Return a canary at its first step."""
    return arrive(shifting(**changes))


def last_step(**changes: Any) -> Run:
    run = holding(**changes).on(Looked(make_verdict("UNDECIDED"), "look/1"), after_s=60)
    return arrive(run)


def baking(**changes: Any) -> Run:
    return last_step(**changes).on(Looked(make_verdict("NON_INFERIOR"), "look/2"), after_s=60)


SEEN = Sighted("", "")


def baked(run: Run) -> Run:
    """Let the time of a bake pass, look a last time, and see all servers ready."""
    return run.on(SEEN, after_s=60).on(servers(old="ready", new="ready"))


def cleaned(run: Run, *, loser: str, winner: str = "old") -> Run:
    """Let a rollout that is ending end."""
    run.on(route({winner: 100}, {loser: 7}, in_flight={loser: 1}))
    run.on(route({winner: 100}, {loser: 7}, in_flight={loser: 1}), after_s=1.5)
    assert run.rollout.cleanup == "draining"
    run.on(route({winner: 100}, {loser: 7}), after_s=1)
    assert run.rollout.cleanup == "removing"
    return run.on(servers(**{winner: "ready"}), after_s=1)


# --- the way to traffic ---------------------------------------------------------------------------


def test_a_canary_begins_with_one_server_and_no_traffic() -> None:
    run = canary().on(TimePassed())
    assert (run.phase, run.weight) == ("deploying", 0)
    assert run.wanted() == {OLD: 1, NEW: 1}
    assert RenewLease(120.0) in run.commands


def test_a_second_request_changes_nothing() -> None:
    run = canary()
    again = requested(run.channel, make_plan(), release=release_id("other"))
    assert again == run.channel


def test_deploying_says_what_it_waits_for() -> None:
    run = canary().on(servers(old="ready", new="starting"))
    assert run.phase == "deploying"
    assert run.rollout.reason == f"0 of 1 servers of {NEW} are ready"
    run.on(ServersSeen((ServerSeen(f"{NEW}-0", NEW, "starting", "It compiles."),)))
    assert run.rollout.reason == f"0 of 1 servers of {NEW} are ready: It compiles."


def test_a_server_that_fails_to_start_withdraws_the_release() -> None:
    run = canary().on(servers(old="ready", new="failed"))
    assert (run.phase, run.rollout.ending) == ("rolling_back", "withdrawn")
    assert run.channel.rejected == ()
    assert "failed" in run.rollout.reason


def test_a_candidate_that_never_had_traffic_is_removed_at_once() -> None:
    run = canary().on(servers(old="ready", new="failed"))
    assert run.wanted() == {OLD: 1, NEW: 0}
    run.on(servers(old="ready"))
    assert (run.phase, run.rollout.outcome) == ("idle", "withdrawn")
    assert run.channel.candidate is None


@pytest.mark.parametrize("state", ["starting", "unhealthy"])
def test_a_deployment_has_a_time_limit(state: str) -> None:
    run = canary().on(servers(old="ready", new=state)).on(TimePassed(), after_s=299)
    assert run.phase == "deploying"
    run.on(TimePassed(), after_s=1)
    assert run.rollout.ending == "withdrawn"


def test_warm_up_is_wished_for_until_every_server_is_warm() -> None:
    run = warming()
    assert run.phase == "warming"
    assert WarmUp(NEW, 3, ()) in run.commands
    run.on(WarmedUp(WARM, asked=3, answered=3))
    assert WarmUp(NEW, 3, (WARM,)) in run.commands
    run.on(servers(old="ready", new="ready"))
    assert (run.phase, run.weight) == ("shifting", 10)


def test_a_restarted_server_must_warm_up_again() -> None:
    run = warming().on(WarmedUp(f"{NEW}-0@an-earlier-start", asked=3, answered=3))
    run.on(servers(old="ready", new="ready"))
    assert run.phase == "warming"


def test_a_server_lost_while_warming_is_waited_for() -> None:
    run = warming().on(servers(old="ready", new="starting"))
    assert run.phase == "deploying"


def test_no_warm_up_requests_need_no_answers() -> None:
    assert warming(warm_up_requests=0).phase == "shifting"


@pytest.mark.parametrize(
    ("answered", "refused", "ending"),
    [(2, 0, "withdrawn"), (2, 1, "withdrawn"), (0, 2, "withdrawn"), (0, 3, "rolled_back")],
)
def test_warm_up_requests_must_all_be_answered(answered: int, refused: int, ending: str) -> None:
    run = warming().on(WarmedUp(WARM, 3, answered, refused, "status 500"))
    assert run.rollout.ending == ending
    assert len(run.channel.rejected) == (ending == "rolled_back")
    assert f"{answered} of 3" in run.rollout.reason


def test_more_servers_come_after_the_first_is_warm() -> None:
    run = warming(replicas=3, stable_replicas=3)
    assert run.rollout.replicas.candidate == 1
    run.on(WarmedUp(WARM, 3, 3)).on(servers(old=("ready",) * 3, new="ready"))
    assert (run.phase, run.weight) == ("scaling", 0)
    assert run.wanted() == {OLD: 3, NEW: 3}
    run.on(servers(old=("ready",) * 3, new=("ready",) * 3))
    assert run.phase == "warming"
    for index in (1, 2):
        run.on(WarmedUp(f"{NEW}-{index}@{NOW.isoformat()}", 3, 3))
    run.on(servers(old=("ready",) * 3, new=("ready",) * 3))
    assert (run.phase, run.weight) == ("shifting", 10)


# --- shifting -------------------------------------------------------------------------------------


def test_a_shift_is_over_when_arrivals_agree() -> None:
    run = shifting()
    run.on(route({"old": 100}, {"old": 50}))
    assert run.rollout.mark is None
    assert arrive(run).phase == "holding"


def test_few_arrivals_are_waited_for() -> None:
    run = arrive(shifting(), total=20)
    assert run.phase == "shifting"
    run.on(route({"old": 90, "new": 10}, {"old": 20, "new": 2}), after_s=28)
    assert run.phase == "shifting"
    run.on(route({"old": 90, "new": 10}, {"old": 20, "new": 2}), after_s=1)
    assert run.phase == "holding"


def test_arrivals_that_contradict_the_weights_end_the_rollout() -> None:
    run = shifting()
    weights = {"old": 90, "new": 10}
    run.on(route(weights, {"old": 0, "new": 0})).on(route(weights, {"old": 300}), after_s=10)
    assert run.phase == "shifting"
    run.on(route(weights, {"old": 600}), after_s=20)
    assert run.rollout.ending == "withdrawn"
    assert "0 of 600 requests" in run.rollout.reason


def test_a_router_that_sends_nothing_to_the_candidate_is_no_small_deviation() -> None:
    run = shifting()
    weights = {"old": 90, "new": 10}
    run.on(route(weights, {"old": 0, "new": 0})).on(route(weights, {"old": 100}), after_s=28)
    assert run.phase == "shifting"
    run.on(route(weights, {"old": 100}), after_s=2)
    assert run.rollout.ending == "withdrawn"
    assert "0 of 100 requests" in run.rollout.reason


def test_nothing_may_still_be_an_accident_among_few() -> None:
    run = shifting()
    weights = {"old": 90, "new": 10}
    run.on(route(weights, {"old": 0, "new": 0})).on(route(weights, {"old": 51}), after_s=10)
    assert run.phase == "shifting"
    run.on(route(weights, {"old": 52, "new": 5}), after_s=1)
    assert run.phase == "holding"


def test_a_route_that_does_not_take_the_weights_ends_the_rollout() -> None:
    run = shifting().on(route({"old": 100}), after_s=29)
    assert run.phase == "shifting"
    run.on(route({"old": 100}), after_s=1)
    assert run.rollout.ending == "withdrawn"
    assert "did not take the weights" in run.rollout.reason


def test_a_route_that_fails_over_is_waited_for_while_stable_is_away() -> None:
    run = shifting().on(servers(old="starting", new="ready"))
    run.on(route({"new": 100}), after_s=100)
    assert run.phase == "shifting"


def test_a_router_that_cannot_be_asked_ends_the_rollout() -> None:
    run = shifting().on(TimePassed(), after_s=59)
    assert run.phase == "shifting"
    run.on(TimePassed(), after_s=1)
    assert run.rollout.ending == "withdrawn"


@pytest.mark.parametrize("weights", [{"old": 90}, {"new": 10}, {"old": 80, "new": 10}])
def test_both_weights_must_be_in_effect(weights: dict[str, int]) -> None:
    run = shifting().on(route(weights))
    assert run.rollout.mark is None


def test_a_router_that_took_the_weights_may_be_silent_for_a_while() -> None:
    run = shifting().on(route({"old": 90, "new": 10}), after_s=1).on(TimePassed(), after_s=100)
    assert run.phase == "shifting"


def test_a_late_report_of_a_warm_up_changes_nothing() -> None:
    run = holding()
    before = run.channel
    assert run.on(WarmedUp(f"{NEW}-1@later", 3, 0, 3)).channel == before


def test_a_restarted_router_is_measured_anew() -> None:
    run = shifting()
    weights = {"old": 90, "new": 10}
    run.on(route(weights, {"old": 1000, "new": 100}))
    run.on(route(weights, {"old": 9, "new": 1}, epoch="2"), after_s=1)
    assert run.phase == "shifting"
    run.on(route(weights, {"old": 189, "new": 21}, epoch="2"), after_s=1)
    assert run.phase == "holding"


# --- holding --------------------------------------------------------------------------------------


def test_a_step_waits_for_its_time_and_for_a_look() -> None:
    run = holding().on(Looked(make_verdict("UNDECIDED"), "look/1"), after_s=59)
    assert (run.phase, run.weight) == ("holding", 10)
    run.on(TimePassed(), after_s=100)
    assert (run.phase, run.weight) == ("holding", 10)
    run.on(Looked(make_verdict("UNDECIDED"), "look/2"))
    assert (run.phase, run.weight, run.rollout.step_index) == ("shifting", 50, 1)


def test_a_step_needs_requests_that_the_candidate_has_answered() -> None:
    run = holding().on(Looked(make_verdict("UNDECIDED", exposed=0), "look/1"), after_s=100)
    assert (run.phase, run.weight) == ("holding", 10)


def test_proof_at_an_early_step_does_not_promote() -> None:
    run = holding().on(Looked(make_verdict("NON_INFERIOR"), "look/1"), after_s=60)
    assert (run.phase, run.weight) == ("shifting", 50)


def test_the_last_step_needs_proof_and_its_time() -> None:
    run = last_step().on(Looked(make_verdict("NON_INFERIOR"), "look/2"), after_s=30)
    assert run.phase == "holding"
    run.on(Looked(make_verdict("UNDECIDED"), "look/3"), after_s=60)
    assert run.phase == "holding"
    run.on(Looked(make_verdict("NON_INFERIOR"), "look/4"))
    assert run.phase == "baking"


@pytest.mark.parametrize("make", [shifting, holding, last_step, baking])
def test_harm_takes_all_traffic_back_and_rejects(make: Any) -> None:
    run = make().on(Looked(make_verdict("HARM"), "look/9"))
    assert (run.phase, run.weight, run.rollout.ending) == ("rolling_back", 0, "rolled_back")
    assert run.channel.stable.release_id == OLD
    assert run.channel.candidate.release_id == NEW
    (rejection,) = run.channel.rejected
    assert (rejection.release_id, rejection.evidence_key) == (NEW, "look/9")
    assert rejection.reason == "The judge says HARM."
    assert run.wanted() == {OLD: 1, NEW: 1}


@pytest.mark.parametrize("make", [shifting, holding, last_step, baking])
def test_a_fuse_rejects(make: Any) -> None:
    run = make().on(FuseBlown("Fuse: its first requests all failed."))
    assert (run.weight, run.rollout.ending) == (0, "rolled_back")
    assert run.channel.rejected[0].release_id == NEW


@pytest.mark.parametrize("make", [canary, warming])
def test_alarms_mean_nothing_before_exposure(make: Any) -> None:
    run = make()
    before = run.channel
    assert run.on(FuseBlown("old news")).on(ControllerLost("old news")).channel == before


@pytest.mark.parametrize("make", [shifting, holding, last_step, baking])
def test_a_lost_controller_withdraws_without_rejecting(make: Any) -> None:
    run = make().on(ControllerLost("its lease expired"))
    assert (run.weight, run.rollout.ending) == (0, "withdrawn")
    assert run.channel.stable.release_id == OLD
    assert run.channel.rejected == ()


@pytest.mark.parametrize("make", [canary, warming, shifting, holding, last_step, baking])
def test_an_abort_withdraws(make: Any) -> None:
    run = make().on(AbortRequested("enough", who="ann"))
    assert (run.phase, run.weight, run.rollout.ending) == ("rolling_back", 0, "withdrawn")
    assert run.channel.stable.release_id == OLD
    assert run.channel.history[-1].who == "ann"


@pytest.mark.parametrize("make", [shifting, holding])
@pytest.mark.parametrize("state", ["starting", "unhealthy", "failed"])
def test_a_candidate_without_a_ready_server_is_broken(make: Any, state: str) -> None:
    run = make().on(servers(old="ready", new=state))
    assert run.rollout.ending == "rolled_back"


def test_one_of_several_servers_may_restart() -> None:
    run = holding(replicas=1)
    run.on(servers(old="ready", new=("ready", "starting")))
    assert run.phase == "holding"


# --- undecided ------------------------------------------------------------------------------------


def test_an_undecided_rollout_freezes_at_the_proven_step() -> None:
    run = last_step().on(Looked(make_verdict("UNDECIDED"), "look/2"), after_s=60)
    run.on(TimePassed(), after_s=480)
    assert (run.phase, run.weight) == ("holding", 50)
    assert run.rollout.held_since == run.now
    assert any(isinstance(c, Notify) and c.entry.event == "held" for c in run.commands)
    run.on(Looked(make_verdict("NON_INFERIOR"), "look/3"), after_s=10)
    assert run.phase == "baking"


def test_a_step_that_was_not_held_long_enough_is_taken_back() -> None:
    run = holding(max_duration_s=100.0)
    run.on(Looked(make_verdict("UNDECIDED"), "look/1"), after_s=70)
    arrive(run)
    assert run.weight == 50
    run.on(TimePassed(), after_s=40)
    assert (run.phase, run.weight, run.rollout.step_index) == ("shifting", 10, 0)
    arrive(run).on(Looked(make_verdict("UNDECIDED"), "look/2"), after_s=100)
    assert (run.phase, run.weight) == ("holding", 10)


def test_proof_in_a_hold_goes_on_to_the_last_step_and_promotes_there_only() -> None:
    run = holding(max_duration_s=100.0)
    run.on(Looked(make_verdict("UNDECIDED"), "look/1"), after_s=70)
    arrive(run).on(TimePassed(), after_s=40)
    arrive(run).on(Looked(make_verdict("NON_INFERIOR"), "look/2"), after_s=60)
    assert (run.phase, run.weight) == ("shifting", 50)
    held_since = run.rollout.held_since
    arrive(run).on(Looked(make_verdict("NON_INFERIOR"), "look/3"), after_s=59)
    run.on(Looked(make_verdict("UNDECIDED"), "look/4"), after_s=1)
    assert (run.phase, run.rollout.held_since) == ("holding", held_since)
    run.on(Looked(make_verdict("NON_INFERIOR"), "look/5"))
    assert run.phase == "baking"


def test_a_hold_that_goes_on_is_still_bounded() -> None:
    run = holding(max_duration_s=100.0)
    run.on(Looked(make_verdict("UNDECIDED"), "look/1"), after_s=70)
    arrive(run).on(TimePassed(), after_s=40)
    arrive(run).on(Looked(make_verdict("NON_INFERIOR"), "look/2"), after_s=60)
    arrive(run).on(Looked(make_verdict("UNDECIDED"), "look/3"), after_s=60)
    assert run.on(TimePassed(), after_s=180).rollout.ending == "withdrawn"


def test_a_hold_is_bounded() -> None:
    run = last_step().on(TimePassed(), after_s=600)
    assert run.rollout.held_since is not None
    arrive(run)
    run.on(TimePassed(), after_s=300)
    assert (run.weight, run.rollout.ending) == (0, "withdrawn")
    assert run.channel.rejected == ()
    assert "could not decide" in run.rollout.reason


def test_undecided_may_mean_to_go_back() -> None:
    run = last_step(on_undecided="rollback").on(TimePassed(), after_s=600)
    assert run.rollout.ending == "withdrawn"


# --- baking and the end ---------------------------------------------------------------------------


def test_promotion_swaps_the_roles_and_keeps_a_holdback() -> None:
    run = baking()
    assert (run.channel.stable.release_id, run.channel.candidate.release_id) == (NEW, OLD)
    assert (run.channel.weights.stable, run.weight) == (90, 10)
    assert run.wanted() == {OLD: 1, NEW: 1}
    assert run.rollout.outcome is None


def test_a_bake_ends_with_the_old_release_gone() -> None:
    run = baking().on(SEEN, after_s=59).on(servers(old="ready", new="ready"))
    assert run.phase == "baking"
    run.on(SEEN, after_s=1).on(servers(old="ready", new="ready"))
    assert (run.phase, run.weight, run.rollout.ending) == ("scaling", 0, "promoted")
    assert run.wanted() == {OLD: 1, NEW: 1}
    cleaned(run, loser="old", winner="new")
    assert (run.phase, run.rollout.outcome) == ("idle", "promoted")
    assert run.channel.candidate is None
    assert [track.release_id for track in run.channel.previous] == [OLD]
    assert run.wanted() == {NEW: 1, OLD: 0}
    assert any(isinstance(c, Attest) and c.kind == "promotion" for c in run.commands)
    assert ReleaseLease() in run.commands


def test_a_promoted_release_leaves_its_rejection_behind() -> None:
    run = holding().on(Looked(make_verdict("HARM"), "look/1"))
    cleaned(run, loser="new")
    assert run.channel.rejected
    forced = Run(requested(run.channel, make_plan(warm_up_requests=0)), run.now)
    forced.on(servers(old="ready", new="ready"))
    arrive(forced).on(Looked(make_verdict("UNDECIDED"), "l"), after_s=60)
    arrive(forced).on(Looked(make_verdict("NON_INFERIOR"), "l"), after_s=60)
    baked(forced)
    cleaned(forced, loser="old", winner="new")
    assert forced.rollout.outcome == "promoted"
    assert forced.channel.rejected == ()


def test_the_old_release_may_stay_warm_for_a_while() -> None:
    run = baked(baking(keep_warm_s=100.0))
    run.on(route({"new": 100}, {"old": 7})).on(route({"new": 100}, {"old": 7}), after_s=2)
    assert run.rollout.outcome == "promoted"
    assert OLD not in run.wanted()
    assert run.channel.previous[0].warm_until == run.now + timedelta(seconds=100)
    later = run.now + timedelta(seconds=101)
    assert RemoveServers(OLD) in commands_for(run.channel, later)


def test_autoscalers_are_held_as_long_as_a_rollout_runs_and_then_work_on_the_stable_release() -> (
    None
):
    run = baking()
    commands = commands_for(run.channel, run.now)
    assert HoldAutoscaling() in commands
    assert commands.index(HoldAutoscaling()) < min(
        index for index, each in enumerate(commands) if isinstance(each, DeployServers)
    )
    assert not [each for each in commands if isinstance(each, ResumeAutoscaling)]
    baked(run)
    cleaned(run, loser="old", winner="new")
    assert run.rollout.outcome == "promoted"
    commands = commands_for(run.channel, run.now)
    assert ResumeAutoscaling(NEW) in commands
    assert HoldAutoscaling() not in commands


def test_a_bake_does_not_end_before_a_last_look() -> None:
    run = baking().on(SEEN, after_s=59).on(servers(old="ready", new="ready"), after_s=40)
    assert (run.phase, run.rollout.ending) == ("baking", None)
    assert "a last look is to come" in run.rollout.reason
    run.on(Sighted("no counters", "")).on(servers(old="ready", new="ready"))
    assert run.phase == "baking"
    run.on(SEEN).on(servers(old="ready", new="ready"))
    assert run.rollout.ending == "promoted"


def test_a_bake_that_nobody_drove_begins_anew() -> None:
    run = baking(holdback_weight=0, lease_s=120.0).on(TimePassed(), after_s=30)
    run.on(servers(old="ready", new="ready"), after_s=121).on(SEEN).on(TimePassed())
    run.on(servers(old="ready", new="ready"), after_s=59)
    assert run.phase == "baking"
    assert run.events()[-1] == "bake_anew"
    run.on(SEEN, after_s=1).on(servers(old="ready", new="ready"))
    assert run.rollout.ending == "promoted"


def test_harm_while_nobody_drove_the_bake_still_counts() -> None:
    run = first_release(lease_s=60.0).on(route({"new": 100}, {"new": 10}))
    run.on(servers(new="ready"), after_s=600)
    run.on(route({"new": 100}, {"new": 210}, errors={"new": 12}))
    assert run.rollout.ending == "rolled_back"


@pytest.mark.parametrize("unseen", ["no counters", ""])
def test_a_bake_that_nobody_can_watch_is_not_everlasting(unseen: str) -> None:
    run = baking() if unseen else first_release()
    for _ in range(100):
        run.on(servers(old="ready", new="ready"), after_s=30)
        if unseen:
            run.on(Sighted(unseen, unseen))
        run.on(TimePassed())
        if run.rollout.ending is not None:
            break
    assert run.rollout.ending == "withdrawn"


def test_the_router_must_have_been_watched_for_the_whole_bake() -> None:
    run = first_release().on(route({"new": 100}))
    run.on(route({"new": 100}, epoch="2"), after_s=30).on(
        route({"new": 100}, epoch="2"), after_s=59
    )
    run.on(servers(new="ready")).on(TimePassed())
    assert run.phase == "baking"
    run.on(route({"new": 100}, epoch="2"), after_s=1).on(servers(new="ready"))
    assert run.rollout.ending == "promoted"


def test_the_holdback_goes_where_it_can_be_served() -> None:
    run = baking().on(servers(old="starting", new="ready"))
    assert (run.phase, run.weight) == ("baking", 0)
    run.on(servers(old="ready", new="ready"))
    assert run.weight == 10


def test_a_bake_waits_for_all_servers_but_not_for_ever() -> None:
    run = baking()
    for _ in range(5):
        run.on(TimePassed(), after_s=60)
        assert run.phase == "baking"
    run.on(TimePassed(), after_s=60)
    assert (run.rollout.ending, run.channel.stable.release_id) == ("withdrawn", OLD)


def test_a_new_release_without_servers_loses_its_bake() -> None:
    run = baking().on(servers(old="ready", new="starting"))
    assert (run.channel.stable.release_id, run.weight) == (OLD, 0)
    assert run.rollout.ending == "rolled_back"


def test_rolling_back_ends_in_order() -> None:
    run = holding().on(Looked(make_verdict("HARM"), "look/1"))
    run.on(route({"old": 90, "new": 10}, {"new": 5}), after_s=1)
    assert run.rollout.mark is None
    run.on(route({"old": 100}, {"new": 6}), after_s=1)
    run.on(route({"old": 100}, {"new": 7}), after_s=2)
    assert run.rollout.cleanup == "traffic"
    cleaned(run, loser="new")
    assert (run.phase, run.rollout.outcome) == ("idle", "rolled_back")
    assert [c.kind for c in run.commands if isinstance(c, Attest)] == ["rejection"]
    assert run.wanted() == {OLD: 1, NEW: 0}


def test_a_candidate_keeps_its_servers_until_its_requests_have_ended() -> None:
    run = holding().on(Looked(make_verdict("HARM"), "look/1"))
    assert run.wanted()[NEW] == 1
    run.on(TimePassed(), after_s=30)
    assert run.rollout.cleanup == "draining"
    assert "unverified" in run.events()
    assert run.wanted()[NEW] == 1
    run.on(TimePassed(), after_s=30)
    assert run.rollout.cleanup == "removing"
    assert run.wanted()[NEW] == 0


def test_servers_that_vanish_do_not_shorten_the_way_back() -> None:
    run = holding().on(Looked(make_verdict("HARM"), "look/1")).on(servers(old="ready"))
    assert run.rollout.cleanup == "traffic"
    assert run.rollout.outcome is None


def test_a_way_back_that_has_begun_is_not_begun_again() -> None:
    run = holding().on(Looked(make_verdict("HARM"), "look/1"))
    before = run.channel
    assert run.on(AbortRequested("enough"), after_s=5).channel == before
    assert run.on(Looked(make_verdict("HARM"), "look/2")).channel == before
    assert run.on(FuseBlown("late")).channel == before


def test_rejections_of_other_releases_stay() -> None:
    channel = used_channel()
    other = Rejection(release_id=release_id("other"), at=NOW, rollout=0, reason="Harm.")
    channel = channel.model_copy(update={"rejected": (other,)})
    run = Run(requested(channel, make_plan(warm_up_requests=0)))
    run.on(servers(old="ready", new="ready")).on(FuseBlown("broken"))
    assert [r.release_id for r in run.channel.rejected] == [release_id("other"), NEW]


def test_each_side_gets_its_own_full_size() -> None:
    three, two = ("ready",) * 3, ("ready",) * 2
    plan = make_plan(replicas=3, stable_replicas=2, warm_up_requests=0)
    run = Run(requested(used_channel(), plan)).on(servers(old=two, new="ready"))
    run.on(servers(old=two, new=three)).on(servers(old=two, new=three))
    run.on(AbortRequested("enough"))
    assert run.rollout.cleanup == "traffic"
    run.on(TimePassed(), after_s=30).on(TimePassed(), after_s=30).on(servers(old=two))
    assert run.rollout.outcome == "withdrawn"
    assert run.wanted() == {OLD: 2, NEW: 0}


def test_requests_that_do_not_stop_are_waited_for_but_not_for_ever() -> None:
    run = holding().on(Looked(make_verdict("HARM"), "look/1"))
    for arrivals in range(119):
        run.on(route({"old": 100}, {"new": arrivals}), after_s=1).on(TimePassed())
    assert run.rollout.cleanup == "traffic"
    run.on(TimePassed(), after_s=1)
    assert run.rollout.cleanup == "draining"
    assert run.events()[-1] == "unverified"


def test_a_withdrawn_release_is_attested_nothing() -> None:
    run = holding().on(AbortRequested("enough"))
    cleaned(run, loser="new")
    assert not [c for c in run.commands if isinstance(c, Attest)]
    assert run.events()[-1] == "withdrawn"
    assert run.channel.history[-1].detail == {"why": "enough"}


def test_a_rollback_ends_even_if_nobody_answers_any_more() -> None:
    run = holding().on(Looked(make_verdict("HARM"), "look/1"))
    for _ in range(3):
        run.on(TimePassed(), after_s=300)
    assert run.rollout.outcome == "rolled_back"


# --- a release that serves alone ------------------------------------------------------------------

ONLY_NEW = servers(old="starting", new="ready")
BOTH = servers(old="ready", new="ready")


@pytest.mark.parametrize("make", [shifting, holding, last_step])
@pytest.mark.parametrize("on_undecided", ["hold", "rollback"])
def test_no_limit_of_time_takes_the_only_release_that_answers(make: Any, on_undecided: str) -> None:
    run = make(on_undecided=on_undecided).on(ONLY_NEW)
    for _ in range(200):
        run.on(Sighted("", "no counters of old"), after_s=30).on(ONLY_NEW)
        run.on(route({"new": 100}, {"new": 900})).on(TimePassed())
    assert run.rollout.ending is None
    assert run.wanted() == {OLD: 1, NEW: 1}


def test_a_pause_does_not_end_while_only_the_candidate_answers() -> None:
    run = paused(holding()).on(ONLY_NEW).on(TimePassed(), after_s=20000)
    assert run.rollout.ending is None


def test_people_are_told_once_that_only_the_candidate_answers() -> None:
    run = holding().on(ONLY_NEW).on(TimePassed(), after_s=29)
    assert "stable_down" not in run.events()
    for _ in range(3):
        run.on(TimePassed(), after_s=1).on(ONLY_NEW)
    run.on(BOTH, after_s=60)
    assert [event for event in run.events() if "stable_" in event] == ["stable_down", "stable_back"]
    told = [c.entry.event for c in run.commands if isinstance(c, Notify)]
    assert told[-2:] == ["stable_down", "stable_back"]


def test_a_short_absence_is_told_to_nobody() -> None:
    run = holding().on(ONLY_NEW).on(TimePassed(), after_s=10).on(BOTH).on(TimePassed(), after_s=60)
    assert not {"stable_down", "stable_back"} & set(run.events())


def test_limits_begin_anew_when_stable_is_back() -> None:
    run = shifting().on(ONLY_NEW).on(route({"new": 100}, {"new": 50}))
    run.on(Sighted("", "no counters of old")).on(TimePassed(), after_s=550)
    run.on(BOTH).on(route({"new": 100}, {"new": 900}), after_s=29).on(TimePassed())
    assert run.phase == "shifting"
    assert arrive(run).phase == "holding"
    run = holding(max_duration_s=5000.0).on(ONLY_NEW).on(Sighted("", "no counters of old"))
    run.on(TimePassed(), after_s=4000).on(BOTH).on(TimePassed(), after_s=599)
    assert run.phase == "holding"
    assert run.on(TimePassed(), after_s=1).rollout.ending == "withdrawn"


@pytest.mark.parametrize("make", [holding, baking])
def test_a_withdrawn_release_keeps_its_servers_until_the_other_one_answers(make: Any) -> None:
    run = make()
    run.on(ONLY_NEW).on(AbortRequested("enough"))
    for _ in range(100):
        run.on(route({"new": 100}, {"new": 900}), after_s=30).on(ONLY_NEW).on(TimePassed())
    assert (run.phase, run.wanted()) == ("rolling_back", {OLD: 1, NEW: 1})
    run.on(BOTH, after_s=1)
    assert run.weight == 0
    cleaned(run, loser="new")
    assert (run.rollout.outcome, run.channel.stable.release_id) == ("withdrawn", OLD)


def test_requests_that_were_ending_begin_anew_when_the_other_one_fails() -> None:
    run = holding().on(AbortRequested("enough")).on(TimePassed(), after_s=30)
    assert run.rollout.cleanup == "draining"
    run.on(ONLY_NEW)
    assert run.rollout.cleanup == "traffic"
    run.on(BOTH, after_s=900).on(TimePassed(), after_s=29)
    assert run.rollout.cleanup == "traffic"


def test_known_harm_is_not_kept_for_want_of_another() -> None:
    run = holding().on(ONLY_NEW).on(Looked(make_verdict("HARM"), "look/9")).on(ONLY_NEW)
    run.on(TimePassed(), after_s=30).on(TimePassed(), after_s=30)
    assert (run.rollout.ending, run.wanted()) == ("rolled_back", {OLD: 1, NEW: 0})


def test_a_person_may_keep_the_only_release_that_answers() -> None:
    run = shifting()
    assert "not sure yet" in promotion_refusal(run.channel)
    run.on(ONLY_NEW).on(FORCE)
    stable = run.channel.stable
    assert (run.phase, run.weight, stable and stable.release_id) == ("baking", 0, NEW)


# --- without comparison ---------------------------------------------------------------------------


def first_release(**changes: Any) -> Run:
    plan = make_plan(kind="bootstrap", stable_replicas=0, **changes)
    run = Run(requested(empty_channel(), plan)).on(servers(new="ready"))
    return run.on(WarmedUp(WARM, 3, 3)).on(servers(new="ready"))


def test_a_first_release_gets_everything_after_its_warm_up() -> None:
    run = first_release()
    assert (run.phase, run.weight) == ("baking", 0)
    assert run.channel.stable.release_id == NEW
    assert run.channel.candidate is None
    run.on(route({"new": 100})).on(route({"new": 100}, {"new": 9}), after_s=60)
    run.on(servers(new="ready")).on(servers(new="ready"))
    assert (run.phase, run.rollout.outcome) == ("idle", "promoted")
    assert run.channel.previous == ()


def test_a_first_release_that_fails_requests_is_rejected() -> None:
    run = first_release().on(route({"new": 100}, {"new": 10}))
    run.on(route({"new": 100}, {"new": 60}), after_s=1)
    run.on(route({"new": 100}, {"new": 110}, errors={"new": 1}), after_s=1)
    assert run.phase == "baking"
    run.on(route({"new": 100}, {"new": 210}, errors={"new": 12}), after_s=1)
    assert run.rollout.ending == "rolled_back"
    assert "12 of 200 requests failed, 6.0%" in run.channel.rejected[0].reason
    assert run.channel.stable is None
    run.on(TimePassed(), after_s=30).on(TimePassed(), after_s=30).on(servers(), after_s=1)
    assert (run.rollout.outcome, run.channel.stable) == ("rolled_back", None)
    assert run.wanted() == {NEW: 0}


def test_the_absolute_limit_is_the_plans_floor_of_errors() -> None:
    metrics = [
        metric.model_copy(update={"harm_floor": 0.2 if metric.name == "errors" else 0.01})
        for metric in default_metrics()
    ]
    judge = JudgeSpec(metrics=tuple(metrics), max_duration_s=600.0)
    run = first_release(judge=judge).on(route({"new": 100}, {"new": 0}))
    run.on(route({"new": 100}, {"new": 200}, errors={"new": 30}), after_s=1)
    assert run.phase == "baking"
    run.on(route({"new": 100}, {"new": 400}, errors={"new": 150}), after_s=1)
    assert "allowed are 20.0%" in run.rollout.reason


def test_failures_before_a_restart_of_the_router_are_not_counted_twice() -> None:
    run = first_release().on(route({"new": 100}, {"new": 100}, errors={"new": 50}))
    run.on(route({"new": 100}, {"new": 10}, errors={"new": 1}), after_s=1)
    run.on(route({"new": 100}, {"new": 110}, errors={"new": 2}), after_s=1)
    run.on(route({"new": 100}, {"new": 20}, errors={"new": 20}, epoch="2"), after_s=1)
    assert run.phase == "baking"


def test_a_bake_with_a_comparison_has_no_absolute_limit() -> None:
    run = baking().on(route({"new": 90, "old": 10}, {"new": 0}))
    run.on(route({"new": 90, "old": 10}, {"new": 100}, errors={"new": 50}), after_s=1)
    assert run.phase == "baking"


def errors_of_stable(share: float) -> Verdict:
    """Return a verdict that knows how many of stable's requests failed."""
    figures = dict.fromkeys(
        ("harm_evidence", "harm_threshold", "promote_evidence", "promote_threshold"), 0.0
    )
    errors = MetricVerdict(
        metric="errors",
        outcome="NON_INFERIOR",
        stable_value=share,
        candidate_value=share,
        ratio=1.0,
        harm_margin=2.0,
        promote_margin=3.0,
        stable_requests=1000,
        candidate_requests=1000,
        blocks=9,
        note="",
        **figures,
    )
    return make_verdict("NON_INFERIOR").model_copy(update={"metrics": (errors,)})


@pytest.mark.parametrize(
    ("share", "failed", "ending"),
    [(0.0, 30, "rolled_back"), (0.02, 30, None), (0.02, 90, "rolled_back")],
)
def test_a_bake_without_a_holdback_has_the_absolute_limit(
    share: float, failed: int, ending: str | None
) -> None:
    run = last_step(holdback_weight=0).on(Looked(errors_of_stable(share), "l"), after_s=60)
    assert (run.phase, run.weight) == ("baking", 0)
    run.on(route({"new": 100}, {"new": 0}))
    run.on(route({"new": 100}, {"new": 1000}, errors={"new": failed}), after_s=9)
    assert run.rollout.ending == ending


def test_the_absolute_limit_is_no_reason_to_go_back_to_nothing() -> None:
    run = baking().on(servers(old="starting", new="ready")).on(route({"new": 100}, {"new": 0}))
    run.on(route({"new": 100}, {"new": 100}, errors={"new": 50}), after_s=9)
    assert run.phase == "baking"


def test_a_first_release_outlives_its_controller() -> None:
    run = first_release().on(ControllerLost("its lease expired"))
    assert run.phase == "baking"


def test_single_stops_the_old_release_first() -> None:
    run = canary(capacity="single", holdback_weight=0)
    run.on(servers(old="stopping"))
    assert (run.phase, run.wanted()) == ("scaling", {OLD: 0, NEW: 0})
    run.on(servers())
    assert (run.phase, run.wanted()) == ("deploying", {OLD: 0, NEW: 1})
    run.on(servers(new="ready")).on(WarmedUp(WARM, 3, 3)).on(servers(new="ready"))
    assert run.phase == "baking"
    assert run.channel.stable.release_id == NEW
    run.on(route({"new": 100})).on(route({"new": 100}), after_s=60).on(servers(new="ready"))
    cleaned(run, loser="old", winner="new")
    assert run.rollout.outcome == "promoted"
    assert run.channel.previous[0].release_id == OLD


def test_single_brings_the_old_release_back() -> None:
    run = canary(capacity="single", holdback_weight=0).on(servers())
    run.on(servers(new="failed"))
    assert (run.rollout.ending, run.wanted()) == ("withdrawn", {OLD: 0, NEW: 0})
    run.on(servers())
    assert run.rollout.outcome is None
    assert run.wanted() == {OLD: 1, NEW: 0}
    run.on(servers(old="ready"))
    assert run.rollout.outcome == "withdrawn"


def test_replace_grows_for_the_next_step_only() -> None:
    steps = tuple(RolloutStep(weight=weight, hold_s=60) for weight in (25, 50, 75))
    run = canary(capacity="replace", replicas=4, stable_replicas=4, warm_up_requests=0, steps=steps)
    four = ("ready",) * 4
    arrive(run.on(servers(old=four, new="ready")))
    run.on(servers(old=four, new="ready")).on(servers(old=four[:3], new=four[:2]))
    assert run.wanted() == {OLD: 3, NEW: 2}
    run.on(TimePassed(), after_s=600).on(servers(old=four[:3], new=four[:2]))
    assert (run.rollout.held_since, run.wanted()) == (run.now, {OLD: 3, NEW: 2})


def test_replace_shrinks_the_old_release_by_ready_servers() -> None:
    run = canary(capacity="replace", replicas=4, stable_replicas=4, warm_up_requests=0)
    four = ("ready",) * 4
    run.on(servers(old=four, new="ready"))
    assert (run.phase, run.weight) == ("shifting", 10)
    assert run.wanted() == {OLD: 4, NEW: 1}
    arrive(run).on(servers(old=four, new="ready"))
    assert run.wanted() == {OLD: 3, NEW: 2}
    run.on(Looked(make_verdict("UNDECIDED"), "l"), after_s=60)
    assert (run.phase, run.weight) == ("holding", 10)
    run.on(servers(old=four[:3], new=four[:2]))
    run.on(Looked(make_verdict("UNDECIDED"), "l"))
    assert (run.phase, run.weight) == ("shifting", 50)
    arrive(run).on(servers(old=four[:3], new=four[:2]))
    run.on(Looked(make_verdict("NON_INFERIOR"), "l"), after_s=60)
    assert run.phase == "baking"
    assert run.weight == 60
    for new in (2, 3, 4):
        run.on(servers(old=four[: 5 - new], new=four[:new]))
        assert run.wanted() == {NEW: min(4, new + 1), OLD: max(1, 5 - min(4, new + 1))}
    assert run.weight == 10


# --- going back -----------------------------------------------------------------------------------


def promoted() -> Channel:
    run = baked(baking())
    return cleaned(run, loser="old", winner="new").channel


def test_a_rollback_moves_traffic_before_everything_else() -> None:
    plan = make_plan(kind="rollback", warm_up_requests=3)
    run = Run(requested(promoted(), plan, release=OLD), NOW + timedelta(hours=1))
    run.on(servers(old="starting", new="ready"))
    assert (run.phase, run.channel.stable.release_id) == ("deploying", NEW)
    run.on(servers(old="ready", new="ready"))
    run.on(WarmedUp(f"{OLD}-0@{NOW.isoformat()}", 3, 3)).on(servers(old="ready", new="ready"))
    assert (run.phase, run.channel.stable.release_id) == ("rolling_back", OLD)
    assert run.weight == 0
    cleaned(run, loser="new")
    assert run.rollout.outcome == "promoted"
    assert run.channel.previous == ()
    assert run.channel.rejected == ()
    assert run.events()[-1] == "returned"
    assert not [c for c in run.commands if isinstance(c, Attest)]


def test_a_rollback_that_cannot_start_its_servers_is_withdrawn() -> None:
    run = Run(requested(promoted(), make_plan(kind="rollback"), release=OLD))
    run.on(servers(old="failed", new="ready")).on(servers(new="ready"))
    assert (run.rollout.outcome, run.events()[-1]) == ("withdrawn", "withdrawn")
    assert run.channel.stable.release_id == NEW
    assert [track.release_id for track in run.channel.previous] == [OLD]


def test_a_server_of_unknown_age_is_warmed_up_for_a_rollback() -> None:
    run = Run(requested(promoted(), make_plan(kind="rollback"), release=OLD))
    run.on(ServersSeen((ServerSeen(f"{OLD}-0", OLD, "ready"),)))
    assert run.phase == "warming"


def test_a_rollback_to_warm_servers_moves_traffic_at_once() -> None:
    plan = make_plan(kind="rollback", warm_up_requests=3)
    channel = promoted()
    run = Run(channel, NOW + timedelta(hours=1))
    run.on(RolloutRequested(number=2, release_id=OLD, plan=plan, run_id="back"))
    run.on(servers(old="ready", new="ready"))
    assert (run.phase, run.channel.stable.release_id) == ("rolling_back", OLD)


UNDO = UndoRequested("It answers nonsense.", "ann")


@pytest.mark.parametrize("make", [canary, warming, shifting, holding, last_step, baking])
def test_undoing_what_is_under_way_withdraws_it(make: Any) -> None:
    run = make().on(UNDO)
    assert (run.phase, run.weight, run.rollout.ending) == ("rolling_back", 0, "withdrawn")
    assert run.channel.stable.release_id == OLD
    assert run.channel.history[-1].who == "ann"


@pytest.mark.parametrize("draining", [False, True])
def test_undoing_what_has_baked_swaps_the_roles_back_while_the_old_servers_are_there(
    draining: bool,
) -> None:
    run = baked(baking())
    if draining:
        run.on(TimePassed(), after_s=30)
        assert run.rollout.cleanup == "draining"
    run.on(UNDO)
    stable = run.channel.stable
    assert (run.phase, stable and stable.release_id) == ("rolling_back", OLD)
    assert run.wanted() == {OLD: 1, NEW: 1}
    cleaned(run, loser="new")
    assert (run.rollout.outcome, run.channel.previous) == ("withdrawn", ())
    assert run.channel.rejected == ()


def test_what_cannot_be_undone_by_a_swap_is_left_to_its_end() -> None:
    gone = baked(baking()).on(servers(new="ready"))
    removing = baked(baking()).on(TimePassed(), after_s=30).on(TimePassed(), after_s=30)
    back = going_back()
    rejected = holding().on(Looked(make_verdict("HARM"), "l"))
    for run in (gone, removing, back, rejected):
        before = run.channel
        assert run.on(UNDO).channel == before
    assert run.on(AbortRequested("enough")).channel == before


def test_an_abort_does_not_undo_what_has_baked() -> None:
    run = baked(baking())
    before = run.channel
    assert run.on(AbortRequested("enough")).channel == before


FOUR = ("ready",) * 4
REPLACE = {"capacity": "replace", "replicas": 4, "stable_replicas": 4, "warm_up_requests": 0}


def going_back(**changes: Any) -> Run:
    """Return a rollback with `replace` whose first server is ready."""
    plan = make_plan(kind="rollback", **{**REPLACE, **changes})
    run = Run(requested(promoted(), plan, release=OLD), NOW + timedelta(hours=1))
    return run.on(servers(old="ready", new=FOUR))


def test_a_rollback_without_room_for_both_exchanges_servers_one_by_one() -> None:
    run = going_back()
    stable = run.channel.stable
    assert (run.rollout.cleanup, stable and stable.release_id) == ("exchanging", OLD)
    for ready, weight in ((1, 75), (2, 50), (3, 25)):
        assert run.weight == weight
        assert run.wanted() == {OLD: ready + 1, NEW: 4 - ready}
        run.on(route({"old": 100 - weight, "new": weight}), after_s=99).on(TimePassed())
        run.on(servers(old=FOUR[: ready + 1], new=FOUR[ready:]))
    assert (run.weight, run.rollout.cleanup) == (0, "traffic")
    cleaned(run, loser="new")
    assert (run.rollout.outcome, run.wanted()) == (None, {OLD: 4, NEW: 0})
    run.on(servers(old=FOUR))
    assert run.rollout.outcome == "promoted"
    weights = [h.detail["weight"] for h in run.channel.history if h.event == "weights"]
    assert weights[-4:] == [25, 50, 75, 100]


def test_an_exchange_of_servers_ends_in_time_and_says_what_is_missing() -> None:
    run = going_back()
    run.on(servers(old=FOUR[:2], new=FOUR[:3]), after_s=10).on(TimePassed(), after_s=290)
    assert (run.weight, run.rollout.cleanup) == (0, "traffic")
    for _ in range(3):
        run.on(TimePassed(), after_s=300)
    assert run.rollout.outcome == "promoted"
    assert f"Only 2 of 4 servers of {OLD} are ready." in run.rollout.reason


def test_an_exchange_whose_loser_dies_is_over() -> None:
    run = going_back().on(servers(old="ready", new="starting"))
    assert (run.weight, run.rollout.cleanup) == (0, "traffic")


def test_alarms_and_lost_drivers_do_not_disturb_an_exchange() -> None:
    run = going_back()
    before = run.channel
    for event in (ControllerLost("late"), FuseBlown("late"), AbortRequested("late")):
        assert run.on(event).channel == before


def half_baked() -> Run:
    """Return a bake with `replace` that has left the old release one server."""
    run = canary(**REPLACE).on(servers(old=FOUR, new="ready"))
    arrive(run).on(Looked(make_verdict("UNDECIDED"), "l/1"), after_s=60)
    run.on(servers(old=FOUR[:3], new=FOUR[:2])).on(Looked(make_verdict("UNDECIDED"), "l/1"))
    arrive(run).on(Looked(make_verdict("NON_INFERIOR"), "l/2"), after_s=60)
    for new in (3, 4):
        run.on(servers(old=FOUR[: 5 - new], new=FOUR[:new]))
    assert (run.phase, run.wanted()) == ("baking", {OLD: 1, NEW: 4})
    return run


@pytest.mark.parametrize("event", [ControllerLost("nobody drives it"), AbortRequested("enough")])
def test_a_withdrawn_bake_gives_back_what_the_old_release_can_bear(event: Event) -> None:
    run = half_baked().on(event)
    stable = run.channel.stable
    assert (run.phase, stable and stable.release_id) == ("rolling_back", OLD)
    assert (run.weight, run.wanted()) == (75, {OLD: 2, NEW: 3})
    for ready in (2, 3, 4):
        run.on(servers(old=FOUR[:ready], new=FOUR[: 5 - ready]))
    assert run.weight == 0
    cleaned(run, loser="new").on(servers(old=FOUR))
    assert run.rollout.outcome == "withdrawn"


def test_harm_in_a_bake_takes_all_traffic_away_whatever_the_old_release_can_bear() -> None:
    run = half_baked().on(Looked(make_verdict("HARM"), "l/3"))
    assert (run.weight, run.rollout.cleanup) == (0, "traffic")
    cleaned(run, loser="new")
    assert (run.rollout.outcome, run.wanted()) == (None, {OLD: 4, NEW: 0})
    run.on(servers(old=FOUR[:3])).on(servers(old=FOUR), after_s=100)
    assert run.rollout.outcome == "rolled_back"


# --- by hand --------------------------------------------------------------------------------------

PAUSE = PauseRequested("Something is odd.", "ann")
FORCE = PromotionForced("The old one leaks memory.", "ann")


def paused(run: Run) -> Run:
    run.on(PAUSE)
    assert run.rollout.paused is not None
    return run


def test_a_pause_says_who_why_and_for_how_long_it_may_last() -> None:
    run = paused(holding(max_pause_s=900.0))
    entry = run.channel.history[-1]
    assert (entry.event, entry.who) == ("paused", "ann")
    assert entry.detail == {"weight": 10, "until_s": 900.0, "why": "Something is odd."}
    assert entry in [c.entry for c in run.commands if isinstance(c, Notify)]


def test_a_paused_rollout_takes_no_step_and_is_still_driven() -> None:
    run = paused(holding()).on(Looked(make_verdict("UNDECIDED"), "look/1"), after_s=3600)
    assert (run.phase, run.weight, run.rollout.step_index) == ("holding", 10, 0)
    assert run.rollout.evidence_key == "look/1"
    assert RenewLease(120.0) in run.commands
    run.on(ResumeRequested("All is well.", "bob")).on(Looked(make_verdict("UNDECIDED"), "look/2"))
    assert (run.phase, run.weight) == ("shifting", 50)


def test_a_paused_rollout_is_not_promoted_by_the_judge() -> None:
    run = paused(last_step()).on(Looked(make_verdict("NON_INFERIOR"), "look/2"), after_s=600)
    assert (run.phase, run.weight) == ("holding", 50)
    run.on(ResumeRequested()).on(Looked(make_verdict("NON_INFERIOR"), "look/3"))
    assert run.phase == "baking"


@pytest.mark.parametrize(
    ("event", "ending"),
    [
        (Looked(make_verdict("HARM"), "look/1"), "rolled_back"),
        (FuseBlown("ten failed"), "rolled_back"),
        (servers(old="ready", new="failed"), "rolled_back"),
        (servers(old="ready"), "rolled_back"),
        (ControllerLost("nobody drives it"), "withdrawn"),
        (AbortRequested("enough"), "withdrawn"),
    ],
)
@pytest.mark.parametrize("phase", ["holding", "baking"])
def test_whatever_takes_traffic_back_does_so_in_a_pause(
    phase: str, event: Event, ending: str
) -> None:
    run = paused(holding() if phase == "holding" else baking())
    run.on(event, after_s=100)
    stable = run.channel.stable
    assert (run.rollout.ending, run.weight, stable and stable.release_id) == (ending, 0, OLD)
    assert run.rollout.paused is None
    assert run.rollout.paused_s(run.now) == 100


def test_a_shift_whose_arrivals_do_not_follow_ends_in_a_pause_too() -> None:
    run = paused(shifting()).on(route({"old": 100}), after_s=30)
    assert run.rollout.ending == "withdrawn"


def test_a_shift_is_finished_in_a_pause() -> None:
    assert arrive(paused(shifting())).phase == "holding"


def test_before_traffic_a_pause_lets_servers_get_ready_and_no_more() -> None:
    run = paused(canary()).on(servers(old="ready", new="ready"))
    run.on(WarmedUp(WARM, 3, 3)).on(servers(old="ready", new="ready"), after_s=1000)
    assert (run.phase, run.weight) == ("warming", 0)
    assert "when it is resumed" in run.rollout.reason
    run.on(TimePassed()).on(ResumeRequested()).on(servers(old="ready", new="ready"))
    assert (run.phase, run.weight) == ("shifting", 10)


def test_the_time_of_pauses_does_not_count_against_the_limits() -> None:
    run = paused(canary()).on(ResumeRequested(), after_s=1000).on(TimePassed(), after_s=299)
    assert run.phase == "deploying"
    assert run.on(TimePassed(), after_s=1).rollout.ending == "withdrawn"

    run = paused(holding()).on(ResumeRequested(), after_s=5000).on(TimePassed(), after_s=598)
    assert run.rollout.held_since is None
    run.on(TimePassed(), after_s=2)
    assert run.rollout.held_since == run.now
    run.on(PAUSE, after_s=100).on(TimePassed(), after_s=1000)
    assert run.rollout.ending is None
    run.on(ResumeRequested()).on(TimePassed(), after_s=199)
    assert run.rollout.ending is None
    assert run.on(TimePassed(), after_s=1).rollout.ending == "withdrawn"


def test_a_bake_does_not_end_in_a_pause_and_is_not_late_after_it() -> None:
    run = paused(baking(lease_s=5000.0)).on(SEEN, after_s=2000)
    run.on(servers(old="ready", new="ready")).on(TimePassed())
    assert (run.phase, run.weight) == ("baking", 10)
    run.on(ResumeRequested()).on(TimePassed())
    assert run.phase == "baking"
    assert run.on(servers(old="ready", new="ready")).rollout.ending == "promoted"


@pytest.mark.parametrize("make", [canary, holding, baking])
def test_pauses_are_bounded_in_all_and_the_release_is_withdrawn(make: Any) -> None:
    run = paused(make(max_pause_s=900.0)).on(ResumeRequested(), after_s=400)
    run.on(PAUSE, after_s=10).on(TimePassed(), after_s=499)
    assert run.rollout.ending is None
    run.on(TimePassed(), after_s=1)
    assert (run.rollout.ending, run.weight) == ("withdrawn", 0)
    assert "paused for 900 s in all" in run.rollout.reason
    assert run.channel.rejected == ()


def test_an_undecided_rollout_stays_at_its_weight_in_a_pause() -> None:
    run = paused(last_step()).on(TimePassed(), after_s=3600)
    assert (run.weight, run.rollout.held_since) == (50, None)


def test_servers_of_the_next_step_are_not_started_in_a_pause() -> None:
    plan = {"capacity": "replace", "replicas": 4, "stable_replicas": 4, "warm_up_requests": 0}
    four = ("ready",) * 4
    run = canary(**plan).on(servers(old=four, new="ready"))
    run = paused(arrive(run)).on(servers(old=four, new="ready"))
    assert run.rollout.replicas.candidate == 1
    run.on(ResumeRequested()).on(servers(old=four, new="ready"))
    assert run.rollout.replicas.candidate == 2


def test_a_paused_bake_keeps_its_holdback_unless_nobody_serves_it() -> None:
    plan = {"capacity": "replace", "replicas": 2, "stable_replicas": 2, "warm_up_requests": 0}
    two = ("ready", "ready")
    run = canary(**plan).on(servers(old=two, new="ready"))
    run = arrive(run).on(Looked(make_verdict("UNDECIDED"), "l/1"), after_s=60)
    run = arrive(run).on(Looked(make_verdict("NON_INFERIOR"), "l/2"), after_s=60)
    before = paused(run).weight
    assert run.phase == "baking"
    run.on(servers(old=two, new=two))
    assert run.weight == before
    run.on(servers(old="unhealthy", new=two))
    assert run.weight == 0


def test_what_cannot_be_paused_says_why() -> None:
    run = holding()
    assert pause_refusal(run.channel, NOW) == ""
    assert "paused already, by ann" in pause_refusal(paused(run).channel, run.now)
    assert "No rollout is under way" in pause_refusal(used_channel(), NOW)
    ending = holding().on(AbortRequested("enough"))
    assert "No rollout is under way" in pause_refusal(ending.channel, ending.now)
    back = requested(promoted(), make_plan(kind="rollback"), release=OLD)
    assert "brings clients back" in pause_refusal(back, NOW)
    single = canary(capacity="single")
    assert "downtime longer" in pause_refusal(single.channel, NOW)
    often = holding()
    for _ in range(PAUSE_LIMIT):
        often.on(PAUSE).on(ResumeRequested())
    assert "20 times" in pause_refusal(often.channel, often.now)
    long = holding(max_pause_s=60.0).on(PAUSE).on(ResumeRequested(), after_s=60)
    assert "60 s in all" in pause_refusal(long.channel, long.now)
    for refused in (run, ending, single, often, long):
        assert step(refused.channel, PAUSE, refused.now)[0] == refused.channel


def test_only_what_is_paused_can_be_resumed() -> None:
    run = holding()
    assert resume_refusal(run.channel) == "No rollout is paused."
    assert run.on(ResumeRequested()).rollout.pauses == ()
    assert resume_refusal(used_channel()) == "No rollout is paused."
    assert resume_refusal(paused(run).channel) == ""


def test_a_promotion_by_hand_goes_to_the_bake_from_any_step() -> None:
    run = holding().on(Looked(make_verdict("UNDECIDED"), "look/1")).on(FORCE, after_s=1)
    stable = run.channel.stable
    assert (run.phase, run.weight, stable and stable.release_id) == ("baking", 10, NEW)
    by_hand = run.rollout.promoted_by_hand
    assert by_hand is not None
    assert (by_hand.who, by_hand.reason, by_hand.verdict) == (FORCE.who, FORCE.reason, "UNDECIDED")
    entry = run.channel.history[-1]
    assert (entry.event, entry.who, entry.detail["why"]) == (
        "promoted_by_hand",
        "ann",
        "The old one leaks memory.",
    )
    assert "proven" not in run.events()


def test_a_promotion_by_hand_is_on_record_for_good() -> None:
    run = baked(holding().on(FORCE))
    cleaned(run, loser="old", winner="new")
    assert run.rollout.outcome == "promoted"
    assert "ann promoted it by hand: The old one leaks memory." in run.rollout.reason
    (attest,) = [c for c in run.commands if isinstance(c, Attest)]
    assert attest.subject["by_hand"]["who"] == "ann"


def test_a_promotion_by_hand_can_still_be_rolled_back() -> None:
    run = holding().on(FORCE).on(Looked(make_verdict("HARM"), "look/2"))
    stable = run.channel.stable
    assert (run.rollout.ending, stable and stable.release_id) == ("rolled_back", OLD)


def test_a_promotion_by_hand_ends_a_pause_and_an_undecided_hold() -> None:
    run = last_step().on(TimePassed(), after_s=601)
    assert run.rollout.held_since is not None
    paused(run).on(FORCE)
    assert (run.phase, run.rollout.paused, run.rollout.held_since) == ("baking", None, None)


def test_a_promotion_by_hand_needs_a_reason() -> None:
    run = holding()
    assert run.on(PromotionForced("  ", "ann")).phase == "holding"


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (canary, "It is deploying"),
        (warming, "It is warming"),
        (shifting, "not sure yet"),
        (baking, "taken over already"),
        (lambda: holding().on(FuseBlown("ten failed")), "ending already. ten failed"),
        (lambda: holding().on(Looked(make_verdict("HARM"), "l")), "The judge says HARM"),
        (lambda: holding().on(servers(old="ready", new="starting")), "ending already"),
        (lambda: warming(capacity="single"), "not compared"),
        (lambda: Run(used_channel()), "No rollout is under way."),
    ],
)
def test_a_promotion_by_hand_is_refused(make: Any, why: str) -> None:
    run = make()
    assert why in promotion_refusal(run.channel)
    before = run.channel
    assert run.on(FORCE).channel == before


def test_the_judges_harm_and_missing_servers_refuse_a_promotion_by_hand() -> None:
    run = holding()
    harmful = run.rollout.model_copy(update={"verdict": make_verdict("HARM")})
    channel = run.channel.model_copy(update={"rollout": harmful})
    assert promotion_refusal(channel) == "The judge says HARM: The judge says HARM."
    assert step(channel, FORCE, run.now)[0] == channel
    plan = {"replicas": 2, "stable_replicas": 2, "warm_up_requests": 0}
    two = ("ready", "ready")
    run = canary(**plan).on(servers(old=two, new="ready")).on(servers(old=two, new=two))
    run = arrive(run.on(servers(old=two, new=two)))
    assert run.phase == "holding"
    run.on(servers(old=two, new="ready"))
    assert promotion_refusal(run.channel) == "1 of 2 servers of the candidate are ready."


# --- requests that wait ---------------------------------------------------------------------------


def test_those_who_wait_are_in_the_order_in_which_they_came() -> None:
    run = holding()
    for name in ("one", "two", "three"):
        run.on(QueueJoined(name, OLD, "bob"), after_s=1)
    assert [w.run_id for w in run.channel.waiting] == ["one", "two", "three"]
    assert [place_in_line(run.channel, w, run.now) for w in ("one", "two", "three")] == [0, 1, 2]
    assert place_in_line(run.channel, "four", run.now) == 3
    entry = run.channel.history[-1]
    assert (entry.event, entry.who, entry.detail["place"]) == ("queued", "bob", 3)
    run.on(QueueLeft("two"))
    assert place_in_line(run.channel, "three", run.now) == 1
    assert run.on(QueueLeft("two")).events()[-1] == "unqueued"


def test_who_still_waits_writes_it_only_now_and_then() -> None:
    run = holding().on(QueueJoined("one", OLD))
    before = run.channel
    assert run.on(QueueJoined("one", OLD), after_s=29).channel == before
    run.on(QueueJoined("one", OLD), after_s=1)
    assert run.channel.waiting[0].seen_at == run.now
    assert run.channel.waiting[0].since == before.waiting[0].since
    assert run.channel.history == before.history


def test_who_is_silent_is_passed_over_and_keeps_the_place_for_a_day() -> None:
    run = holding().on(QueueJoined("one", OLD)).on(QueueJoined("two", OLD), after_s=180)
    assert place_in_line(run.channel, "two", run.now) == 0
    run.on(QueueJoined("one", OLD), after_s=1)
    assert place_in_line(run.channel, "two", run.now) == 1
    run.on(QueueJoined("three", OLD), after_s=86401)
    assert [w.run_id for w in run.channel.waiting] == ["three"]


def test_the_line_has_an_end_and_a_rollout_takes_its_own_place_away() -> None:
    run = Run(used_channel())
    for number in range(WAITING_LIMIT + 1):
        run.on(QueueJoined(f"run-{number}", NEW))
    assert len(run.channel.waiting) == WAITING_LIMIT
    run.on(RolloutRequested(1, NEW, make_plan(), run_id="run-3"))
    assert "run-3" not in [w.run_id for w in run.channel.waiting]
    assert len(run.channel.waiting) == WAITING_LIMIT - 1


# --- drivers, history, wishes ---------------------------------------------------------------------


def test_a_claim_raises_the_epoch() -> None:
    run = holding().on(DriverClaimed("run"))
    assert (run.rollout.driver.attempt, run.rollout.driver.epoch) == (2, 2)
    run.on(DriverClaimed("another"))
    assert (run.rollout.driver.attempt, run.rollout.driver.epoch) == (1, 3)


def test_a_rollout_stays_its_owners_whoever_drives_it_and_whatever_follows() -> None:
    run = holding()
    owner = run.channel.owner
    assert run.on(DriverClaimed("another")).channel.owner == owner
    run.on(AbortRequested("enough"))
    cleaned(run, loser="new")
    over = run.channel
    again = requested(over, make_plan(), release=release_id("third"))
    (known,) = again.unsettled
    assert (known.run_id, known.rollout, known.outcome) == (owner, 1, "withdrawn")
    assert step(again, OutcomeNoted("somebody else"), run.now)[0] == again
    noted = step(again, OutcomeNoted(owner), run.now)[0]
    assert noted.unsettled == ()
    settled = step(over, OutcomeNoted(owner), run.now)[0]
    assert requested(settled, make_plan(), release=release_id("third")).unsettled == ()


def test_epochs_go_on_from_rollout_to_rollout() -> None:
    run = holding().on(Looked(make_verdict("HARM"), "look/1"))
    cleaned(run, loser="new")
    again = requested(run.channel, make_plan(), release=release_id("third"))
    assert again.rollout is not None
    assert again.rollout.driver.epoch == 2


def test_an_outcome_is_noted_only_once_there_is_one() -> None:
    run = holding()
    assert not run.on(OutcomeNoted()).rollout.settled
    run.on(AbortRequested("enough"))
    cleaned(run, loser="new")
    assert run.on(OutcomeNoted()).rollout.settled


def test_who_asked_is_noted_once_whenever_it_becomes_known() -> None:
    run = holding().on(RequesterNoted(""))
    assert run.rollout.requested_by == ""
    generation = run.channel.generation
    run.on(RequesterNoted("ada")).on(RequesterNoted("bob"))
    assert run.rollout.requested_by == "ada"
    assert run.channel.generation == generation + 1
    assert [entry.who for entry in run.channel.history if entry.event == "requester"] == ["ada"]


@pytest.mark.parametrize("make", [promoted, used_channel, empty_channel])
def test_events_without_a_rollout_change_nothing(make: Any) -> None:
    channel = make()
    for event in (
        servers(old="ready"),
        route({"new": 100}),
        Looked(make_verdict("HARM"), "l"),
        FuseBlown("late"),
        ControllerLost("late"),
        AbortRequested("late"),
        PAUSE,
        ResumeRequested(),
        FORCE,
        WarmedUp("x", 1, 0),
        DriverClaimed("late"),
        TimePassed(),
    ):
        assert step(channel, event, NOW + timedelta(days=1))[0] == channel


def test_a_channel_that_breaks_the_rules_is_never_made() -> None:
    broken = canary().channel.model_copy(update={"weights": Weights(stable=90, candidate=10)})
    with pytest.raises(ValueError, match="phase deploying are not allowed"):
        step(broken, DriverClaimed("run"), NOW)


def test_the_history_is_bounded_and_the_generation_counts() -> None:
    run = holding()
    before = run.channel.generation
    for index in range(2 * HISTORY_LIMIT):
        run.on(DriverClaimed(f"run-{index}"))
    assert len(run.channel.history) == HISTORY_LIMIT
    assert run.channel.generation == before + 2 * HISTORY_LIMIT


def test_people_are_told_what_matters() -> None:
    run = holding().on(Looked(make_verdict("HARM"), "look/1"))
    cleaned(run, loser="new")
    told = [c.entry.event for c in run.commands if isinstance(c, Notify)]
    assert told == ["rollout_started", "weights", "ending", "rolled_back"]


def test_the_stable_release_of_an_unverified_track_stays_unverified() -> None:
    channel = promoted()
    channel = channel.model_copy(
        update={"previous": (Track(release_id=OLD, since=NOW, verified=False),)}
    )
    plan = make_plan(kind="rollback", warm_up_requests=0)
    run = Run(requested(channel, plan, release=OLD)).on(servers(old="ready", new="ready"))
    assert run.channel.stable == Track(release_id=OLD, since=NOW, verified=False)
