"""What holds in every rollout, whatever happens in whatever order."""

from __future__ import annotations

from datetime import datetime, timedelta

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from tests.rollout_world import release_id
from tests.unit.rollout.machine import (
    NOW,
    empty_channel,
    make_plan,
    make_verdict,
    route,
    servers,
)

from trainyard.documents.channel import EXPOSED_PHASES, HISTORY_LIMIT, Channel, Track
from trainyard.rollout.events import (
    AbortRequested,
    Adopted,
    ControllerLost,
    DeployServers,
    DriverClaimed,
    Event,
    FuseBlown,
    Looked,
    ObjectiveMet,
    ObjectiveMissed,
    PauseRequested,
    PromotionForced,
    QueueJoined,
    QueueLeft,
    RemoveServers,
    ResumeRequested,
    RolloutRequested,
    RouteSeen,
    ServersSeen,
    Sighted,
    TimePassed,
    TrafficBeyond,
    UndoRequested,
    WarmedUp,
)
from trainyard.rollout.state_machine import (
    candidate_target,
    commands_for,
    has_comparison,
    step,
)

pytestmark = pytest.mark.usefixtures("only_drawn_edges")

NAMES = ("a", "b", "c")
STATES = ("starting", "ready", "ready", "ready", "unhealthy", "failed", "stopping")
LONGEST_ROLLOUT_S = 7200.0


def is_exposed(channel: Channel) -> bool:
    """Tell whether the release under test may have traffic now."""
    rollout = channel.rollout
    return channel.in_progress and rollout is not None and rollout.phase in EXPOSED_PHASES


def is_alone(channel: Channel) -> bool:
    """Tell whether only the track that may lose its traffic answers, and may go on doing so."""
    rollout = channel.rollout
    if rollout is None or channel.stable is None:
        return False
    if rollout.plan.capacity == "single" or rollout.ending == "rolled_back":
        return False
    compared = rollout.phase in EXPOSED_PHASES - {"baking"}
    ending = rollout.cleanup not in {None, "removing"}
    return (compared or ending) and rollout.ready.stable == 0 < rollout.ready.candidate


class Rollouts(RuleBasedStateMachine):
    """Any number of rollouts of three releases, in a world that does as it likes."""

    channel: Channel
    now: datetime
    unseen_since: datetime | None
    """Since when looks have not seen both releases, as this test reckons."""
    candidate_unseen_since: datetime | None
    """Since when they have seen stable, but not the release under test."""
    baking_since: datetime | None
    """Since when the bake has been driven without a gap."""
    driven_at: datetime | None
    """When somebody last drove."""
    watched_at: datetime | None
    """When somebody last saw what shows harm in the bake."""

    @initialize(
        used=st.booleans(),
        begun=st.booleans(),
        capacity=st.sampled_from(["surge", "replace", "single"]),
        replicas=st.integers(1, 3),
        back=st.booleans(),
        notches=st.sampled_from([0, 1, 1, 2, 2, 2, 3, 4, 6]),
        then=st.sampled_from([(), (61.0, False), (301.0, True)]),
    )
    def begin(
        self,
        used: bool,
        begun: bool,
        capacity: str,
        replicas: int,
        back: bool,
        notches: int,
        then: tuple[float, bool] | tuple[()],
    ) -> None:
        """Begin at rest, or somewhere in a rollout, so that its later parts are seen often."""
        self.channel = empty_channel()
        self.now = NOW
        self.unseen_since = self.candidate_unseen_since = None
        self.baking_since = self.driven_at = self.watched_at = None
        if used:
            tracks = [Track(release_id=release_id(name), since=NOW) for name in ("a", "b")]
            update = {"stable": tracks[0], "previous": (tracks[1],)}
            self.channel = self.channel.model_copy(update=update)
        if begun:
            self.somebody_asks("b", capacity, replicas, back, "hold", 0, 0.0)
            self.all_goes_well(notches)
            if then:
                self.servers_run_on(*then)

    def happen(self, event: Event) -> None:
        before, now = self.channel, self.now
        after, commands = step(before, event, now)
        assert commands == commands_for(after, now), "wishes follow from the channel alone"
        assert step(before, event, now)[0] == after, "the machine is a function"
        assert after.generation == before.generation + (after != before)
        self.check_rejection(before, event, after)
        self.check_promotion(before, event, after)
        self.check_order(before, after)
        self.check_pause(before, event, after)
        self.check_blindness(before, event, after)
        self.check_what_decides_nothing(before, event, after)
        self.check_that_somebody_answers(before, event, after)
        self.check_bake(before, event, after)
        self.check_size(before, event, after)
        self.channel = after
        assert Channel.model_validate_json(after.to_bytes()) == after

    def check_rejection(self, before: Channel, event: Event, after: Channel) -> None:
        if len(after.rejected) <= len(before.rejected):
            return
        assert before.rollout is not None
        broken = isinstance(event, ServersSeen) and before.rollout.phase in EXPOSED_PHASES
        floors = isinstance(event, RouteSeen) and before.rollout.phase == "baking"
        refused = isinstance(event, WarmedUp) and event.answered == 0
        harm = isinstance(event, Looked) and event.verdict.outcome == "HARM"
        assert harm or isinstance(event, FuseBlown) or broken or floors or refused
        assert after.rollout is not None
        assert after.rollout.ending == "rolled_back"

    def check_promotion(self, before: Channel, event: Event, after: Channel) -> None:
        stables = [c.stable.release_id if c.stable else None for c in (before, after)]
        rollout = before.rollout
        if stables[0] == stables[1] or rollout is None or stables[1] is None:
            return
        if isinstance(event, Adopted):
            return
        if stables[1] == rollout.reference_id:
            assert after.rollout is not None
            assert after.rollout.phase == "rolling_back"
            return
        assert stables[1] == rollout.release_id
        if rollout.plan.kind == "canary" and rollout.plan.capacity != "single":
            assert rollout.phase == "holding"
            if isinstance(event, PromotionForced):
                assert after.rollout is not None
                assert after.rollout.promoted_by_hand is not None
                assert rollout.verdict is None or rollout.verdict.outcome != "HARM"
                return
            assert isinstance(event, Looked)
            assert event.verdict.outcome == "NON_INFERIOR"
            assert rollout.step_index == len(rollout.plan.steps) - 1
            assert rollout.paused is None
        else:
            assert rollout.phase in {"warming", "deploying", "scaling"}

    def check_pause(self, before: Channel, event: Event, after: Channel) -> None:
        """In a pause weights stay, or all traffic goes back; nothing ends well."""
        if before.rollout is None or before.rollout.paused is None:
            return
        assert after.rollout is not None
        assert after.rollout.ending != "promoted"
        if not isinstance(event, PromotionForced) and after.rollout.cleanup != "exchanging":
            assert after.weights.candidate in (before.weights.candidate, 0)
        assert after.rollout.paused_s(self.now) <= before.rollout.plan.max_pause_s + 601

    def check_blindness(self, before: Channel, event: Event, after: Channel) -> None:
        """Blind, nothing goes forward but by hand; in time the release is withdrawn."""
        self.reckon_blindness(before, event, after)
        rollout = after.rollout
        if rollout is not None and is_exposed(after):
            blind = rollout.blind
            assert (blind.since if blind else None) == self.unseen_since
            assert (blind.candidate_only_since if blind else None) == self.candidate_unseen_since
            if isinstance(event, TimePassed) and not is_alone(after):
                for since, limit_s in (
                    (self.unseen_since, rollout.plan.blind_s),
                    (self.candidate_unseen_since, rollout.plan.blind_candidate_s),
                ):
                    assert since is None or (self.now - since).total_seconds() < limit_s
        if before.rollout is None or not is_exposed(before) or before.rollout.blind is None:
            return
        assert rollout is not None
        assert rollout.ending != "promoted"
        if isinstance(event, PromotionForced) or before.rollout.phase == "baking":
            return
        assert rollout.phase != "baking"
        assert rollout.step_index <= before.rollout.step_index
        assert after.weights.candidate <= before.weights.candidate

    def check_size(self, before: Channel, event: Event, after: Channel) -> None:
        """Who gets all traffic back can bear it, unless time is up or the other one did harm.

        What is over leaves all servers of the stable release, or says how many are missing.
        """
        if before.rollout is None or not before.in_progress or after.stable is None:
            return
        rollout = after.rollout
        assert rollout is not None
        plan, ready = rollout.plan, rollout.ready
        full = plan.replicas if rollout.ending == "promoted" else plan.stable_replicas
        if not after.in_progress and ready.stable < full:
            assert not isinstance(event, ServersSeen)
            assert f"Only {ready.stable} of {full} servers" in rollout.reason
        left = before.rollout.phase == "baking" or plan.kind == "rollback"
        begins = before.rollout.ending is None and rollout.cleanup == "traffic" and left
        ends = before.rollout.cleanup == "exchanging" != rollout.cleanup
        harmless = rollout.ending != "rolled_back" and plan.capacity != "single"
        if (begins or ends) and harmless and not (ends and isinstance(event, TimePassed)):
            assert ready.stable >= full or ready.candidate == 0

    def check_bake(self, before: Channel, event: Event, after: Channel) -> None:
        """A bake is only passed if somebody drove it all the time, and looked at its end."""
        baking = [c.rollout is not None and c.rollout.phase == "baking" for c in (before, after)]
        if not baking[0]:
            self.baking_since = self.driven_at = self.now
            self.watched_at = None
            return
        assert before.rollout is not None
        assert after.rollout is not None
        assert self.baking_since is not None
        assert self.driven_at is not None
        plan = before.rollout.plan
        if isinstance(event, (ServersSeen, RouteSeen, Sighted, TimePassed)):
            if (self.now - self.driven_at).total_seconds() > plan.lease_s:
                self.baking_since, self.watched_at = self.now, None
            self.driven_at = self.now
        if after.rollout.ending == "promoted":
            assert self.watched_at is not None
            assert (self.watched_at - self.baking_since).total_seconds() >= plan.bake_s
        if isinstance(event, Sighted) and has_comparison(plan):
            self.watched_at = self.watched_at if event.candidate or event.stable else self.now
        if isinstance(event, RouteSeen) and not has_comparison(plan) and before.rollout.mark:
            self.watched_at = self.now

    def reckon_blindness(self, before: Channel, event: Event, after: Channel) -> None:
        if isinstance(event, Sighted) and is_exposed(before):
            unseen, only = event.candidate or event.stable, event.candidate and not event.stable
            self.unseen_since = (self.unseen_since or self.now) if unseen else None
            self.candidate_unseen_since = (
                (self.candidate_unseen_since or self.now) if only else None
            )
        if not is_exposed(after):
            self.unseen_since = self.candidate_unseen_since = None
        if isinstance(event, ServersSeen) and is_alone(before) and not is_alone(after):
            # Stable answers again; until then there was nothing to see of it.
            self.unseen_since = self.unseen_since and self.now
            self.candidate_unseen_since = self.candidate_unseen_since and self.now

    def check_what_decides_nothing(self, before: Channel, event: Event, after: Channel) -> None:
        """Servers of somebody else become stable only where nothing is; warnings change nothing."""
        if isinstance(event, Adopted) and after != before:
            assert before.stable is None
            assert not before.in_progress
            assert after.stable == Track(
                release_id=event.release_id, since=self.now, verified=False
            )
            assert after.rollout == before.rollout
        if isinstance(event, TrafficBeyond) and after != before:
            assert before.rollout is not None
            assert after.rollout is not None
            kinds = [each.kind for each in after.rollout.beyond]
            assert event.kind in kinds
            assert len(set(kinds)) == len(kinds)
            told = event.kind not in {each.kind for each in before.rollout.beyond}
            assert (after.history != before.history) == told
            rest = {"beyond": before.rollout.beyond}
            same = {
                "rollout": after.rollout.model_copy(update=rest),
                "history": before.history,
                "generation": before.generation,
            }
            assert after.model_copy(update=same) == before

    def check_that_somebody_answers(self, before: Channel, event: Event, after: Channel) -> None:
        """Who alone has a ready server keeps it, unless it is known to do harm."""
        if before.rollout is None or not before.in_progress or not is_alone(before):
            return
        assert after.rollout is not None
        if isinstance(event, (TimePassed, Sighted, RouteSeen)):
            assert after.rollout.ending == before.rollout.ending
            assert after.rollout.cleanup == before.rollout.cleanup
        if not is_alone(after):
            return
        assert before.candidate is not None
        gone = {c.release_id for c in commands_for(after, self.now) if isinstance(c, RemoveServers)}
        assert before.candidate.release_id not in gone

    def check_order(self, before: Channel, after: Channel) -> None:
        """Servers go only after their traffic has gone in an earlier change."""
        gone = {c.release_id for c in commands_for(after, self.now) if isinstance(c, RemoveServers)}
        single = after.rollout is not None and after.rollout.plan.capacity == "single"
        for channel in (before, after):
            shares = {
                track.release_id: share
                for track, share in (
                    (channel.stable, channel.weights.stable),
                    (channel.candidate, channel.weights.candidate),
                )
                if track is not None and share > 0
            }
            if not single and channel.in_progress:
                assert not gone & set(shares)

    # --- what may happen ----------------------------------------------------------------------

    @rule(
        name=st.sampled_from(NAMES),
        capacity=st.sampled_from(["surge", "surge", "replace", "single"]),
        replicas=st.integers(1, 3),
        back=st.booleans(),
        on_undecided=st.sampled_from(["hold", "rollback"]),
        warm_up=st.sampled_from([0, 3]),
        keep_warm_s=st.sampled_from([0.0, 60.0]),
    )
    def somebody_asks(
        self,
        name: str,
        capacity: str,
        replicas: int,
        back: bool,
        on_undecided: str,
        warm_up: int,
        keep_warm_s: float,
    ) -> None:
        release = release_id(name)
        stable = self.channel.stable
        if stable is not None and stable.release_id == release:
            return
        known = {track.release_id for track in self.channel.previous}
        kind = (
            "bootstrap" if stable is None else "rollback" if back and release in known else "canary"
        )
        stable_replicas = 0
        if stable is not None:
            # An adopted release has servers, whatever became of a rollout before it.
            before = self.channel.rollout
            stable_replicas = max(1, before.replicas.stable if before is not None else 0)
        plan = make_plan(
            kind=kind,
            capacity=capacity,
            replicas=replicas,
            stable_replicas=stable_replicas,
            on_undecided=on_undecided,
            max_pause_s=900.0,
            warm_up_requests=warm_up,
            keep_warm_s=keep_warm_s,
        )
        number = self.channel.rollout.number + 1 if self.channel.rollout else 1
        self.happen(RolloutRequested(number, release, plan, run_id=f"run-{number}"))

    @rule(data=st.data())
    def servers_are_seen(self, data: st.DataObject) -> None:
        states = {
            name: tuple(data.draw(st.lists(st.sampled_from(STATES), max_size=3))) for name in NAMES
        }
        self.happen(servers(**states))

    @rule()
    def servers_are_as_wished(self) -> None:
        wishes = {
            c.release_id: c.replicas
            for c in commands_for(self.channel, self.now)
            if isinstance(c, DeployServers)
        }
        states = {name: ("ready",) * wishes.get(release_id(name), 0) for name in NAMES}
        self.happen(servers(**states))

    @precondition(lambda self: self.channel.in_progress)
    @rule(answered=st.integers(0, 3), refused=st.integers(0, 3), index=st.integers(0, 2))
    def a_server_warms_up(self, answered: int, refused: int, index: int) -> None:
        assert self.channel.rollout is not None
        server = f"{self.channel.rollout.release_id}-{index}@{NOW.isoformat()}"
        self.happen(WarmedUp(server, 3, answered, min(refused, 3 - answered)))

    @precondition(lambda self: self.channel.in_progress)
    @rule(notches=st.integers(1, 6))
    def all_goes_well(self, notches: int) -> None:
        for _ in range(notches):
            self.servers_are_as_wished()
            for index in range(3):
                self.a_server_warms_up(3, 0, index)
            self.servers_are_as_wished()
            self.the_route_follows(2.0)
            self.now += timedelta(seconds=61)
            self.happen(Sighted("", ""))
            self.happen(Looked(make_verdict("NON_INFERIOR"), f"look/{self.channel.generation}"))
            self.the_route_follows(1.0)
            self.happen(TimePassed())

    @rule(
        shares=st.dictionaries(st.sampled_from(NAMES), st.integers(0, 100)),
        arrivals=st.dictionaries(st.sampled_from(NAMES), st.integers(0, 500)),
        errors=st.dictionaries(st.sampled_from(NAMES), st.integers(0, 50)),
        epoch=st.sampled_from(["1", "1", "2"]),
    )
    def the_route_is_odd(
        self,
        shares: dict[str, int],
        arrivals: dict[str, int],
        errors: dict[str, int],
        epoch: str,
    ) -> None:
        errors = {name: min(number, arrivals.get(name, 0)) for name, number in errors.items()}
        self.happen(route(shares, arrivals, errors=errors, epoch=epoch))

    @rule(seconds=st.sampled_from([0.5, 2.0, 20.0]))
    def the_route_follows(self, seconds: float) -> None:
        shares = {}
        for name in NAMES:
            for track, share in (
                (self.channel.stable, self.channel.weights.stable),
                (self.channel.candidate, self.channel.weights.candidate),
            ):
                if track is not None and track.release_id == release_id(name):
                    shares[name] = share
        self.happen(route(shares, dict.fromkeys(NAMES, 0)))
        self.now += timedelta(seconds=seconds)
        self.happen(route(shares, {name: 10 * share for name, share in shares.items()}))

    @precondition(lambda self: is_exposed(self.channel))
    @rule(minutes=st.sampled_from([1, 3, 12]))
    def the_stable_servers_die(self, minutes: int) -> None:
        """Looks see only the candidate, which answers everything."""
        assert self.channel.rollout is not None
        for _ in range(minutes):
            names = {release_id(name): name for name in NAMES}
            self.happen(servers(**{names[self.channel.rollout.release_id]: "ready"}))
            self.happen(Sighted("", "no counters of stable"))
            self.now += timedelta(seconds=61)
            self.happen(TimePassed())

    @precondition(lambda self: is_exposed(self.channel))
    @rule(seconds=st.sampled_from([31.0, 61.0, 301.0]), looks=st.booleans())
    def servers_run_on(self, seconds: float, looks: bool) -> None:
        """Time has passed, and all servers are as they should be."""
        self.now += timedelta(seconds=seconds)
        self.servers_are_as_wished()
        if looks:
            self.happen(Sighted("", ""))
            self.the_route_follows(0.5)
            self.servers_are_as_wished()

    @precondition(lambda self: self.channel.in_progress)
    @rule(data=st.data())
    def some_wished_servers_are_ready(self, data: st.DataObject) -> None:
        wishes = {
            c.release_id: c.replicas
            for c in commands_for(self.channel, self.now)
            if isinstance(c, DeployServers)
        }
        ready = {
            name: ("ready",) * data.draw(st.integers(0, wishes[release_id(name)]))
            for name in NAMES
            if release_id(name) in wishes
        }
        self.happen(servers(**ready))

    @rule(outcome=st.sampled_from(["HARM", "NON_INFERIOR", "UNDECIDED", "UNDECIDED"]))
    def the_judge_looks(self, outcome: str) -> None:
        self.happen(Looked(make_verdict(outcome), f"look/{self.channel.generation}"))  # type: ignore[arg-type]

    @rule(
        candidate=st.sampled_from(["", "no counters of the candidate"]),
        stable=st.sampled_from(["", "", "no counters of stable"]),
    )
    def a_look_is_tried(self, candidate: str, stable: str) -> None:
        self.happen(Sighted(candidate, stable))

    @precondition(lambda self: is_exposed(self.channel))
    @rule(
        candidate=st.sampled_from(["", "no counters of the candidate"]),
        looks=st.integers(2, 8),
    )
    def looks_stay_blind(self, candidate: str, looks: int) -> None:
        """Everything else goes well meanwhile."""
        for _ in range(looks):
            self.now += timedelta(seconds=61)
            self.servers_are_as_wished()
            self.happen(Sighted(candidate, "" if candidate else "no counters of stable"))
            self.happen(Looked(make_verdict("NON_INFERIOR"), f"look/{self.channel.generation}"))
            self.happen(TimePassed())

    @rule(
        event=st.sampled_from(
            [
                Adopted(release_id("c"), "somebody's"),
                TrafficBeyond("prompts", "one prompt in ten is longer"),
                TrafficBeyond("prompts", "one prompt in five is longer"),
                TrafficBeyond("rate", "5 requests a second"),
            ]
        )
    )
    def somebody_tells_something(self, event: Event) -> None:
        self.happen(event)

    @rule(
        event=st.sampled_from(
            [
                FuseBlown("Fuse: broken."),
                ControllerLost("nobody drives it"),
                AbortRequested("enough"),
                UndoRequested("back"),
                DriverClaimed("another"),
            ]
        )
    )
    def something_else_happens(self, event: Event) -> None:
        self.happen(event)

    @rule(
        event=st.sampled_from(
            [
                PauseRequested("odd", "ann"),
                ResumeRequested("fine", "ann"),
                PromotionForced("needed", "ann"),
                PromotionForced("", "ann"),
                QueueJoined("one", release_id("c"), "bob"),
                QueueJoined("two", release_id("b")),
                QueueLeft("one"),
                ObjectiveMissed("errors-page", "Too many fail."),
                ObjectiveMet("errors-page"),
            ]
        )
    )
    def somebody_takes_a_hand(self, event: Event) -> None:
        self.happen(event)

    @rule(seconds=st.sampled_from([0.0, 1.0, 31.0, 61.0, 301.0, 601.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)
        self.happen(TimePassed())

    # --- what always holds --------------------------------------------------------------------

    @invariant()
    def weights_are_safe(self) -> None:
        if not hasattr(self, "channel"):
            return
        channel = self.channel
        assert channel.weights.stable + channel.weights.candidate == 100
        if channel.weights.candidate > 0:
            assert channel.in_progress
            assert channel.candidate is not None
            assert channel.rollout is not None
            if channel.rollout.cleanup == "exchanging":
                assert channel.rollout.ending in {"promoted", "withdrawn"}
            else:
                assert channel.rollout.phase in EXPOSED_PHASES
                assert channel.rollout.ending is None
            assert channel.rollout.exposed_since is not None

    @invariant()
    def documents_stay_small(self) -> None:
        if hasattr(self, "channel"):
            assert len(self.channel.history) <= HISTORY_LIMIT
            assert len(self.channel.previous) <= 10
            assert len(self.channel.rejected) <= len(NAMES)

    @invariant()
    def roles_are_distinct(self) -> None:
        if not hasattr(self, "channel"):
            return
        channel = self.channel
        roles = [track.release_id for track in (channel.stable, channel.candidate) if track]
        assert len(set(roles)) == len(roles)
        assert channel.in_progress or channel.candidate is None

    @invariant()
    def the_stable_release_keeps_its_servers(self) -> None:
        """With `surge`, the release that was stable stays at full size until the bake is over."""
        if not hasattr(self, "channel") or not self.channel.in_progress:
            return
        rollout = self.channel.rollout
        assert rollout is not None
        if rollout.plan.capacity != "surge" or rollout.cleanup is not None:
            return
        tracks = {
            self.channel.stable and self.channel.stable.release_id: rollout.replicas.stable,
            self.channel.candidate
            and self.channel.candidate.release_id: rollout.replicas.candidate,
        }
        if rollout.reference_id:
            assert tracks[rollout.reference_id] == rollout.plan.stable_replicas
        assert tracks[rollout.release_id] <= candidate_target(rollout.plan, rollout.step_index)

    def teardown(self) -> None:
        """Time alone ends every rollout, even if nobody answers any more.

        But for one: a release that alone has a ready server is waited for.
        """
        if not hasattr(self, "channel"):
            return
        if is_alone(self.channel):
            self.now += timedelta(seconds=LONGEST_ROLLOUT_S)
            self.happen(TimePassed())
            assert self.channel.in_progress
        end = self.now + timedelta(seconds=LONGEST_ROLLOUT_S)
        while self.channel.in_progress and self.now < end:
            self.now += timedelta(seconds=30)
            self.happen(TimePassed())
            if is_alone(self.channel):
                self.happen(servers())
        assert not self.channel.in_progress
        assert self.channel.weights.candidate == 0


TestRollouts = Rollouts.TestCase
TestRollouts.settings = settings(max_examples=300, stateful_step_count=30, deadline=None)
