"""What a rollout will do, and what is refused before anything is touched."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from tests.rollout_world import ENVIRONMENT, MODEL, make_release, release_id
from tests.unit.rollout.machine import NOW, empty_channel, make_plan, requested

from trainyard.documents.channel import Channel, Rejection, Rollout, RolloutPlan, Track
from trainyard.documents.evidence import default_metrics, ending_metrics
from trainyard.documents.plan import ReleaseRequest
from trainyard.documents.release import Release
from trainyard.errors import BadInput, Busy, Closed, NotFound, Refused
from trainyard.rollout.plan_rollout import (
    BOOTSTRAP_BAKE_S,
    NothingToDo,
    bake_compares_latencies,
    describe_plan,
    judge_spec,
    plan_rollback,
    plan_rollout,
    promotion_plan,
    recorded_reason,
    rollback_target,
)
from trainyard.spec.environments import Environment
from trainyard.spec.neuron import NeuronSettings

OLD, NEW, OLDER = release_id("old"), release_id("new"), release_id("older")


def channel(
    stable: str | None = "old", *, since_s: float = -3600.0, previous: tuple[str, ...] = ()
) -> Channel:
    def track(name: str, seconds: float) -> Track:
        return Track(release_id=release_id(name), since=NOW + timedelta(seconds=seconds))

    return Channel(
        model=MODEL,
        environment=ENVIRONMENT,
        stable=track(stable, since_s) if stable else None,
        previous=tuple(track(name, since_s - 3600 * (n + 1)) for n, name in enumerate(previous)),
    )


def plan(
    of: Channel | None = None,
    *,
    name: str = "new",
    environment: dict[str, Any] | None = None,
    required: dict[str, Channel] | None = None,
    force: bool = False,
    reason: str = "",
    same: Any = None,
    servers: int = 0,
    **rollout: Any,
) -> RolloutPlan | NothingToDo:
    return plan_rollout(
        of or channel(),
        make_release(name, **rollout),
        Environment(**{"target": "cpu", **(environment or {})}),
        now=NOW,
        drain_timeout_s=20.0,
        force=force,
        reason=reason,
        required=required,
        same_checkpoint=same,
        stable_servers=servers,
    )


def made(*args: Any, **kwargs: Any) -> RolloutPlan:
    found = plan(*args, **kwargs)
    assert isinstance(found, RolloutPlan)
    return found


def test_a_canary_takes_its_numbers_from_the_release_and_the_environment() -> None:
    found = made(environment={"lease_s": 200, "rollback_window_s": 50})
    assert (found.kind, found.capacity, found.replicas) == ("canary", "surge", 1)
    assert (found.lease_s, found.keep_warm_s, found.drain_timeout_s) == (200, 50, 20)
    assert [step.weight for step in found.steps] == [10, 50]
    assert found.judge.last_weight == 50
    assert found.judge.max_duration_s == found.max_duration_s == 600


def test_the_first_release_bootstraps_with_a_short_bake() -> None:
    found = made(channel(None), bake_s=1000)
    assert (found.kind, found.bake_s) == ("bootstrap", BOOTSTRAP_BAKE_S)
    assert made(channel(None), bake_s=5).bake_s == 5


def test_the_stable_release_needs_no_rollout() -> None:
    found = plan(name="old")
    assert isinstance(found, NothingToDo)
    assert "already" in found.message


def test_a_release_for_another_target_is_refused() -> None:
    with pytest.raises(BadInput, match="is for target trn2; production serves cpu"):
        plan(target="trn2")


def promoted(release: Release, *, environment: Any = None, **how: Any) -> Any:
    """Promote a release of a Neuron target to production, where nothing was proven."""
    return plan_rollout(
        channel(None),
        release,
        Environment(**{"target": "cpu", **(environment or {})}),
        now=NOW,
        drain_timeout_s=20.0,
        **{"proven": lambda _: False, **how},
    )


def test_a_neuron_target_that_nobody_has_proven_needs_somebody_who_accepts_it() -> None:
    base = make_release("new")
    neuron = base.target.model_copy(
        update={"lane": "neuron-native", "neuron": NeuronSettings(sdk="2.32.0")}
    )
    release = base.model_copy(update={"target": neuron})
    with pytest.raises(Refused, match="Nobody has proven lane neuron-native"):
        promoted(release)
    with pytest.raises(Refused, match="Nobody has proven"):
        promoted(release, force=True)
    accepted = ReleaseRequest(model=MODEL, accept_unproven=True)
    for plan_ in (
        promoted(release, force=True, reason="It was tried by hand."),
        promoted(release, proven=lambda target: target == neuron),
        promoted(release, environment={"proven_only": False}),
        promoted(release.model_copy(update={"request": accepted})),
        promoted(base),
    ):
        assert isinstance(plan_, RolloutPlan)


def test_a_rollout_under_way_keeps_others_out() -> None:
    busy = requested(channel(), make_plan(), release=release_id("other"))
    with pytest.raises(Busy, match=f"Rollout 1 of {release_id('other')} is under way"):
        plan(busy)


def test_a_rejected_release_needs_force_and_a_reason() -> None:
    rejection = Rejection(release_id=NEW, at=NOW, rollout=7, reason="Harm: ttft 2 s against 1 s.")
    rejected = channel().model_copy(update={"rejected": (rejection,)})
    with pytest.raises(Refused, match="rejected in production by rollout 7: Harm: ttft 2 s"):
        plan(rejected)
    with pytest.raises(BadInput, match="needs a reason"):
        plan(rejected, force=True, reason=" ")
    assert made(rejected, force=True, reason="measured on a broken machine").kind == "canary"
    assert made(rejected, name="other").kind == "canary"


# --- devices --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "given", "got"),
    [
        ("surge", "surge", "surge"),
        ("surge", "replace", "replace"),
        ("replace", "surge", "replace"),
        ("single", "surge", "single"),
        ("surge", "single", "single"),
    ],
)
def test_the_less_generous_capacity_rule_holds(wanted: str, given: str, got: str) -> None:
    environment = {"capacity": given, "devices": 2, "allow_downtime": True}
    assert made(capacity=wanted, environment=environment).capacity == got


@pytest.mark.parametrize(
    ("capacity", "replicas", "devices", "fits"),
    [
        ("surge", 1, 2, True),
        ("surge", 1, 1, False),
        ("surge", 3, 5, False),
        ("replace", 3, 4, True),
        ("replace", 3, 3, False),
        ("single", 3, 3, True),
        ("single", 3, 2, False),
    ],
)
def test_devices_must_suffice(capacity: str, replicas: int, devices: int, fits: bool) -> None:
    environment = {"devices": devices, "allow_downtime": True}
    if fits:
        assert made(capacity=capacity, replicas=replicas, environment=environment)
        return
    with pytest.raises(BadInput, match=f"devices; production has {devices}"):
        plan(capacity=capacity, replicas=replicas, environment=environment)


def test_a_first_release_needs_only_its_own_devices() -> None:
    assert made(channel(None), replicas=2, environment={"devices": 2}).replicas == 2
    with pytest.raises(BadInput, match="needs 3 devices"):
        plan(channel(None), replicas=3, environment={"devices": 2})


def test_downtime_must_be_allowed() -> None:
    with pytest.raises(BadInput, match="does not allow downtime"):
        plan(capacity="single", environment={"devices": 1})
    found = made(capacity="single", environment={"devices": 1, "allow_downtime": True})
    assert (found.holdback_weight, found.keep_warm_s) == (0, 0)


def test_the_stable_release_keeps_its_own_size() -> None:
    rollout = requested(channel(), make_plan()).rollout
    assert rollout is not None
    over: Rollout = rollout.model_copy(
        update={
            "outcome": "promoted",
            "replicas": rollout.replicas.model_copy(update={"stable": 3}),
        }
    )
    used = channel().model_copy(update={"rollout": over})
    found = made(used, replicas=2, environment={"devices": 5})
    assert (found.stable_replicas, found.replicas) == (3, 2)


def test_what_an_autoscaler_added_is_kept_and_given_to_the_candidate_too() -> None:
    found = made(replicas=2, servers=4, environment={"devices": 8})
    assert (found.stable_replicas, found.replicas, found.capacity) == (4, 4, "surge")
    with pytest.raises(BadInput, match="devices"):
        made(replicas=2, servers=4, environment={"devices": 7})


@pytest.mark.parametrize("servers", [0, 1, 2])
def test_fewer_servers_than_wished_for_change_no_plan(servers: int) -> None:
    found = made(replicas=2, servers=servers, environment={"devices": 4})
    assert (found.stable_replicas, found.replicas) == (2, 2)


# --- environments that come first -----------------------------------------------------------------

STAGED = {"requires": ("staging",), "soak_s": 600.0}


def test_a_release_must_have_been_in_the_required_environment() -> None:
    for required in ({}, {"staging": empty_channel()}, {"staging": channel("old")}):
        with pytest.raises(Refused, match="must have been promoted to staging first"):
            plan(environment=STAGED, required=required)


def test_a_release_must_have_soaked() -> None:
    young = channel("new", since_s=-599)
    with pytest.raises(Refused, match="stable in staging for 599 s; 600 s are required"):
        plan(environment=STAGED, required={"staging": young})
    assert made(environment=STAGED, required={"staging": channel("new", since_s=-600)})


def test_a_release_that_still_bakes_is_not_proven() -> None:
    rollout = requested(channel("old"), make_plan()).rollout
    assert rollout is not None
    baking = channel("new").model_copy(
        update={
            "candidate": Track(release_id=OLD, since=NOW - timedelta(days=1)),
            "rollout": rollout.model_copy(update={"phase": "baking"}),
        }
    )
    with pytest.raises(Refused, match="promoted to staging first"):
        plan(environment=STAGED, required={"staging": baking})
    assert made(name="old", of=channel("x"), environment=STAGED, required={"staging": baking})


def test_an_earlier_stable_release_is_proven_if_it_soaked() -> None:
    later = channel("other", since_s=-3600, previous=("new",))
    assert made(environment=STAGED, required={"staging": later})
    hardly = {"requires": ("staging",), "soak_s": 3601.0}
    with pytest.raises(Refused, match="3600 s; 3601 s"):
        plan(environment=hardly, required={"staging": later})


def test_the_same_checkpoint_on_another_target_is_proven() -> None:
    twin = release_id("twin")
    required = {"staging": channel("twin")}
    with pytest.raises(Refused):
        plan(environment=STAGED, required=required)
    assert made(environment=STAGED, required=required, same=lambda name: name in {NEW, twin})


# --- the judge's settings -------------------------------------------------------------------------


def test_margins_of_the_spec_replace_the_defaults() -> None:
    margins = {
        "ttft": {"harm": 0.5, "promote": 0.6},
        "errors": {"harm": 4.0, "promote": 5.0, "promote_ceiling": 0.02},
    }
    settings = {"margins": margins, "block_noise": 0.2, "block_s": 5, "min_blocks_last_step": 3}
    spec = judge_spec(make_release("a", judge=settings).spec.rollout)
    found = {metric.name: metric for metric in spec.metrics}
    default = {metric.name: metric for metric in default_metrics()}
    assert (found["ttft"].harm_margin, found["ttft"].promote_margin) == (0.5, 0.6)
    assert (found["errors"].harm_margin, found["errors"].promote_ceiling) == (4.0, 0.02)
    assert found["errors"].harm_floor == default["errors"].harm_floor > 0
    assert found["tpot"] == default["tpot"]
    assert [m.harm_alpha for m in spec.metrics] == [
        m.harm_alpha for m in (*default_metrics(), *ending_metrics({}))
    ]
    assert spec.covariance.nug == pytest.approx(0.04)
    assert (spec.block_s, spec.min_blocks_last_step) == (5, 3)


def test_how_answers_end_is_judged_unless_the_spec_says_otherwise() -> None:
    found = judge_spec(make_release("a").spec.rollout)
    assert found.metrics[len(default_metrics()) :] == ending_metrics({})
    others = ("truncated", "aborted", "unanswered", "refused")
    endings = {"empty": {"harm": 5}, **{name: {"judged": False} for name in others}}
    changed = judge_spec(make_release("a", judge={"endings": endings}).spec.rollout)
    (empty,) = (metric for metric in changed.metrics if metric.harm_only)
    assert (empty.name, empty.harm_margin, empty.harm_floor) == ("empty", 5, 0.02)


def test_impossible_margins_are_bad_input() -> None:
    judge = {"margins": {"errors": {"harm": 0.5, "promote": 2.0}}}
    with pytest.raises(BadInput, match="ratios to stable"):
        plan(judge=judge)


@pytest.mark.parametrize(
    ("steps", "last"), [((10, 50), 50), ((10, 50, 90), 50), ((10,), 10), ((5, 55, 80), 55)]
)
def test_latencies_are_decided_where_both_sides_have_the_same_load(
    steps: tuple[int, ...], last: int
) -> None:
    found = made(steps=[{"weight": weight, "hold_s": 1} for weight in steps], holdback_weight=5)
    assert found.judge.last_weight == last


def test_steps_that_overload_the_candidate_from_the_start_are_refused() -> None:
    with pytest.raises(BadInput, match="cannot be compared"):
        plan(steps=[{"weight": 80, "hold_s": 60}])


# --- rollbacks ------------------------------------------------------------------------------------


def back(of: Channel, name: str = "older", *, devices: int = 2, **rollout: Any) -> Any:
    return plan_rollback(
        of,
        make_release(name, **rollout),
        Environment(target="cpu", devices=devices),
        drain_timeout_s=20.0,
    )


def test_a_rollback_goes_to_a_release_that_was_stable() -> None:
    used = channel("old", previous=("older",))
    found = back(used)
    assert (found.kind, found.capacity, found.bake_s) == ("rollback", "surge", 0)
    with pytest.raises(NotFound, match="was never stable in production"):
        back(used, "new")
    assert isinstance(back(used, "old"), NothingToDo)


@pytest.mark.parametrize(("devices", "capacity"), [(4, "surge"), (3, "replace"), (2, "single")])
def test_a_rollback_is_never_refused_for_lack_of_devices(devices: int, capacity: str) -> None:
    used = channel("old", previous=("older",))
    assert back(used, devices=devices, replicas=2).capacity == capacity


def test_the_target_is_the_release_before_unless_one_is_named() -> None:
    used = channel("old", previous=("older", "oldest"))
    assert rollback_target(used, None) == OLDER
    assert rollback_target(used, release_id("oldest")) == release_id("oldest")
    assert rollback_target(used, OLD) == OLD
    with pytest.raises(NotFound, match=f"no earlier release {NEW}"):
        rollback_target(used, NEW)
    with pytest.raises(NotFound, match="no earlier release to go back to"):
        rollback_target(channel("old"), None)


# --- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (made(channel(None)), "is the first release: 1 server, 4 warm-up requests"),
        (made(), "1 server (surge), then 10 % for 30 s, 50 % for 60 s at least"),
        (
            made(capacity="single", environment={"allow_downtime": True}),
            "replaces the stable release with downtime",
        ),
        (back(channel("old", previous=("older",)), replicas=2), "goes back to"),
        (made(), "40 s of bake with 10 % held back (latencies are not compared"),
        (made(holdback_weight=50), "50 % held back (latencies are compared as well)"),
        (made(holdback_weight=0), "0 % held back (nothing is left to compare with"),
    ],
)
def test_plans_can_be_told(found: RolloutPlan, words: str) -> None:
    assert words in describe_plan(make_release("new"), found)


@pytest.mark.parametrize(
    ("settings", "compared"),
    [
        ({"holdback_weight": 50}, True),
        ({"holdback_weight": 45}, True),
        ({"holdback_weight": 40}, False),
        ({"holdback_weight": 0}, False),
        # One old server is left beside three new ones, whose load a quarter of the traffic is.
        ({"holdback_weight": 25, "capacity": "replace", "replicas": 3}, True),
        ({"holdback_weight": 20, "capacity": "replace", "replicas": 3}, False),
    ],
)
def test_a_plan_knows_whether_latencies_are_compared_in_the_bake(
    settings: dict[str, Any], compared: bool
) -> None:
    servers = settings.get("replicas", 1)
    found = made(environment={"devices": 8}, servers=servers, **settings)
    assert bake_compares_latencies(found) == compared


FROZEN = {
    "freeze": (
        {
            "start": NOW - timedelta(hours=1),
            "end": NOW + timedelta(hours=2),
            "reason": "end of the year",
        },
    )
}


def test_a_freeze_holds_a_promotion_and_says_until_when() -> None:
    with pytest.raises(Closed, match=r"frozen \(end of the year\)") as refused:
        plan(environment=FROZEN)
    assert refused.value.until == NOW + timedelta(hours=2)
    assert "force it and say why" in refused.value.hint


def test_a_freeze_that_is_over_holds_nothing() -> None:
    over = {"freeze": ({**FROZEN["freeze"][0], "end": NOW},)}
    assert made(environment=over).kind == "canary"


def test_force_with_a_reason_overrides_a_freeze_and_both_are_recorded() -> None:
    assert made(environment=FROZEN, force=True, reason="The old one leaks memory.").kind == "canary"
    with pytest.raises(BadInput, match="forcing one needs a reason"):
        plan(environment=FROZEN, force=True)
    frozen = Environment(**{"target": "cpu", **FROZEN})
    kept = recorded_reason(frozen, NOW, force=True, reason="It leaks.")
    assert kept == "It leaks. (Forced although it is frozen (end of the year).)"
    assert recorded_reason(frozen, NOW, force=False, reason="It leaks.") == "It leaks."


def test_what_is_refused_for_good_is_said_before_a_freeze() -> None:
    with pytest.raises(Refused, match="must have been promoted to staging") as refused:
        plan(environment={**FROZEN, "requires": ("staging",)})
    assert not isinstance(refused.value, Closed)


def test_a_freeze_never_holds_a_rollback() -> None:
    found = plan_rollback(
        channel(previous=("older",)),
        make_release("older"),
        Environment(**{"target": "cpu", **FROZEN}),
        drain_timeout_s=20.0,
    )
    assert isinstance(found, RolloutPlan)


@pytest.mark.parametrize(
    ("scoring", "same", "comparing"),
    [
        ("exact", False, "answers"),
        ("exact", True, "tokens"),
        ("none", True, "tokens"),
        ("none", False, None),
    ],
)
def test_what_answers_are_compared_by_is_pinned_with_the_plan(
    scoring: str, same: bool, comparing: str | None
) -> None:
    probes = {"prompts": "p.jsonl", "scoring": scoring}
    margins = {"quality": {"harm": 2.5, "promote": 4.0}}
    spec = make_release("a", probes=probes, judge={"margins": margins} if comparing else {})
    plan = promotion_plan(
        channel(),
        spec.spec.rollout,
        Environment(target="cpu", devices=2),
        drain_timeout_s=30.0,
        same_checkpoint=same,
    )
    assert plan.probes is not None
    assert plan.probes.comparing == comparing
    found = {metric.name: metric for metric in plan.judge.metrics}
    assert ("quality" in found) is (comparing is not None)
    if comparing is not None:
        assert (found["quality"].harm_margin, found["quality"].promote_margin) == (2.5, 4.0)


def test_what_compares_nothing_has_no_probes() -> None:
    spec = make_release("a", probes={"prompts": "p.jsonl"}).spec.rollout
    plan = promotion_plan(
        empty_channel(), spec, Environment(target="cpu", devices=2), drain_timeout_s=30.0
    )
    assert plan.probes is None
    assert "quality" not in {metric.name for metric in plan.judge.metrics}
