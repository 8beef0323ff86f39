"""Before a rollout: may it happen, and what exactly will it do? Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from pydantic import ValidationError

from trainyard.documents.channel import Channel, ProbePlan, RolloutPlan, Track
from trainyard.documents.evidence import (
    Comparing,
    Covariance,
    JudgeSpec,
    MetricSpec,
    default_metrics,
    ending_metrics,
    quality_metric,
)
from trainyard.documents.release import Release
from trainyard.errors import BadInput, Busy, Closed, NotFound, Refused
from trainyard.rollout.slices import LOAD_PARITY
from trainyard.rollout.state_machine import candidate_target
from trainyard.spec.environments import Environment
from trainyard.spec.model import Capacity, JudgeSettings, RolloutSpec, Target

BOOTSTRAP_BAKE_S = 60.0
"""A first release has nothing to be compared with; a longer bake would show nothing more."""

_GENEROSITY: tuple[Capacity, ...] = ("single", "replace", "surge")


@dataclass(frozen=True)
class NothingToDo:
    """The channel has what was asked for already."""

    message: str


def plan_rollout(
    channel: Channel,
    release: Release,
    environment: Environment,
    *,
    now: datetime,
    drain_timeout_s: float,
    force: bool = False,
    reason: str = "",
    required: Mapping[str, Channel] | None = None,
    same_checkpoint: Callable[[str], bool] | None = None,
    stable_servers: int = 0,
    proven: Callable[[Target], bool] = lambda _: True,
) -> RolloutPlan | NothingToDo:
    """Return what promoting `release` would do, pinned.

    Args:
        channel: of the release's model in `environment`, as it is now.
        release: what is to be promoted.
        environment: where.
        now: for the soak time in the required environments.
        drain_timeout_s: seconds that running requests may take when servers go.
        force: promote although the release was rejected or the environment takes no promotions
            now; needs a reason.
        reason: why.
        required: the channels of the environments that `environment` requires, by name.
        same_checkpoint: tells whether a release id of a required environment stands for the same
            checkpoint; by default only the very release does.
        stable_servers: servers that the stable release has now. An autoscaler may have given it
            more than were wished for; then the candidate gets as many.
        proven: tells whether image, instance and lane of a target were proven on a device.

    Raises:
        Busy: another rollout is under way.
        BadInput: the release is for another target, its settings make no sense, the environment
            has too few devices, or a promotion was forced without a reason.
        Refused: it was rejected here, or has not been proven where it must have been.
        Closed: the environment takes no promotions now.
    """
    _refuse_if_busy(channel)
    name = channel.environment
    if release.target.name != environment.target:
        raise BadInput(
            f"{release.release_id} is for target {release.target.name}; {name} serves "
            f"{environment.target}.",
            hint="Promote the release of that target, or change the environment's target.",
        )
    if channel.stable is not None and channel.stable.release_id == release.release_id:
        return NothingToDo(f"{release.release_id} is the stable release of {name} already.")
    _refuse_rejected(channel, release, force=force, reason=reason)
    same = same_checkpoint or (lambda release_id: release_id == release.release_id)
    for required_name in environment.requires:
        _refuse_unproven(
            required_name, (required or {}).get(required_name), release, environment, same, now
        )
    _refuse_unproven_target(
        release, name, environment, proven, accepted=force and bool(reason.strip())
    )
    # Last: what is refused for good is not worth waiting for.
    _refuse_closed(release, name, environment, now, force=force, reason=reason)
    return promotion_plan(
        channel,
        release.spec.rollout,
        environment,
        drain_timeout_s=drain_timeout_s,
        stable_servers=stable_servers,
        same_checkpoint=channel.stable is not None and same(channel.stable.release_id),
    )


def promotion_plan(
    channel: Channel,
    spec: RolloutSpec,
    environment: Environment,
    *,
    drain_timeout_s: float,
    stable_servers: int = 0,
    same_checkpoint: bool = False,
) -> RolloutPlan:
    """Return what promoting a release with these settings would do, pinned.

    Args:
        channel: as it is now, or as it would be.
        spec: the release's settings.
        environment: where.
        drain_timeout_s: seconds that running requests may take when servers go.
        stable_servers: as for `plan_rollout`.
        same_checkpoint: has the stable release the same checkpoint?

    Raises:
        BadInput: the settings make no sense, or the environment has too few devices.
    """
    kind: Literal["canary", "bootstrap"] = "canary" if channel.stable else "bootstrap"
    name = channel.environment
    spec, stable_replicas = _sizes(channel, spec, stable_servers)
    capacity = _capacity(spec, environment, name, stable_replicas)
    compared = kind == "canary" and capacity != "single"
    probes = _probe_plan(spec, same_checkpoint) if compared else None
    plan = RolloutPlan(
        kind=kind,
        capacity=capacity,
        replicas=spec.replicas,
        stable_replicas=stable_replicas,
        steps=spec.steps,
        bake_s=spec.bake_s if kind == "canary" else min(spec.bake_s, BOOTSTRAP_BAKE_S),
        holdback_weight=spec.holdback_weight if capacity != "single" else 0,
        max_duration_s=spec.max_duration_s,
        on_undecided=spec.on_undecided,
        max_hold_s=spec.max_hold_s,
        max_pause_s=spec.max_pause_s,
        warm_up_requests=spec.warm_up_requests,
        deploy_timeout_s=spec.deploy_timeout_s,
        drain_timeout_s=drain_timeout_s,
        lease_s=environment.lease_s,
        keep_warm_s=environment.rollback_window_s if capacity != "single" else 0.0,
        judge=judge_spec(spec, probes.comparing if probes is not None else None),
        probes=probes,
    )
    if compared:
        plan = plan.model_copy(update={"judge": _at_equal_load(plan)})
    return plan


def plan_rollback(
    channel: Channel,
    release: Release,
    environment: Environment,
    *,
    drain_timeout_s: float,
    stable_servers: int = 0,
) -> RolloutPlan | NothingToDo:
    """Return what rolling back to `release` would do, pinned.

    A rollback to servers that are still warm moves traffic at once. It is never refused for lack of
    devices: without room for both releases, the present one stops first.

    Raises:
        Busy: a rollout is under way.
        NotFound: the release was never stable here.
    """
    _refuse_if_busy(channel)
    if channel.stable is not None and channel.stable.release_id == release.release_id:
        return NothingToDo(
            f"{release.release_id} is the stable release of {channel.environment} already."
        )
    if release.release_id not in {track.release_id for track in channel.previous}:
        raise NotFound(
            f"{release.release_id} was never stable in {channel.environment}.",
            hint="A rollback goes to a release that was; promote this one instead.",
        )
    spec = release.spec.rollout
    spec, stable_replicas = _sizes(channel, spec, stable_servers)
    capacity: Capacity = "single"
    if stable_replicas + spec.replicas <= environment.devices:
        capacity = "surge"
    elif stable_replicas < environment.devices:
        capacity = "replace"
    return RolloutPlan(
        kind="rollback",
        capacity=capacity,
        replicas=spec.replicas,
        stable_replicas=stable_replicas,
        steps=spec.steps,
        bake_s=0.0,
        holdback_weight=0,
        max_duration_s=spec.max_duration_s,
        on_undecided=spec.on_undecided,
        max_hold_s=spec.max_hold_s,
        max_pause_s=spec.max_pause_s,
        warm_up_requests=spec.warm_up_requests,
        deploy_timeout_s=spec.deploy_timeout_s,
        drain_timeout_s=drain_timeout_s,
        lease_s=environment.lease_s,
        judge=judge_spec(spec),
    )


def rollback_target(channel: Channel, release_id: str | None) -> str:
    """Return the release that a rollback goes to: the named one, or the one before the present.

    Raises:
        NotFound: there is none.
    """
    known = [track.release_id for track in channel.previous]
    if release_id is None and known:
        return known[0]
    if release_id is not None and (
        release_id in known or (channel.stable and channel.stable.release_id == release_id)
    ):
        return release_id
    raise NotFound(
        f"{channel.environment} of {channel.model} has no earlier release"
        + (f" {release_id}." if release_id else " to go back to."),
        hint=f"Earlier stable releases: {', '.join(known) or 'none'}.",
    )


def bake_compares_latencies(plan: RolloutPlan) -> bool:
    """Tell whether a server of the new release is loaded in the bake like one of the old one."""
    old = plan.stable_replicas
    if plan.capacity == "replace":
        old = max(1, plan.stable_replicas + 1 - plan.replicas)
    held = plan.holdback_weight
    return (100 - held) / plan.replicas <= LOAD_PARITY * held / max(1, old)


def bake_words(bake_s: float, holdback_weight: int, latencies: bool) -> str:
    """Return what is compared in a bake, for people."""
    if holdback_weight == 0:
        what = "nothing is left to compare with; fuses alone decide"
    elif latencies:
        what = "latencies are compared as well"
    else:
        what = (
            "latencies are not compared at such different loads; "
            "errors, fuses and any probes decide"
        )
    return f"{bake_s:g} s of bake with {holdback_weight} % held back ({what})"


def describe_plan(release: Release, plan: RolloutPlan) -> str:
    """Return what a plan will do, in one sentence."""
    who = f"{release.release_id} (revision {release.revision})"
    servers = f"{plan.replicas} server" + "s" * (plan.replicas != 1)
    if plan.kind == "bootstrap":
        return (
            f"{who} is the first release: {servers}, {plan.warm_up_requests} warm-up requests, "
            f"then all traffic and {plan.bake_s:g} s under an absolute limit on errors."
        )
    if plan.kind == "rollback":
        return f"Traffic goes back to {who} ({servers}) as soon as it is ready."
    if plan.capacity == "single":
        return f"{who} replaces the stable release with downtime: {servers}, then all traffic."
    steps = ", ".join(f"{step.weight} % for {step.hold_s:g} s" for step in plan.steps)
    return (
        f"{who} gets {servers} ({plan.capacity}), then {steps} at least, judged for at most "
        f"{plan.max_duration_s:g} s; then "
        f"{bake_words(plan.bake_s, plan.holdback_weight, bake_compares_latencies(plan))}."
    )


def _probe_plan(spec: RolloutSpec, same_checkpoint: bool) -> ProbePlan | None:
    if spec.probes is None:
        return None
    comparing: Comparing | None = "tokens" if same_checkpoint else "answers"
    if comparing == "answers" and spec.probes.scoring == "none":
        comparing = None
    return ProbePlan(settings=spec.probes, comparing=comparing)


def judge_spec(spec: RolloutSpec, comparing: Comparing | None = None) -> JudgeSpec:
    """Return what the judge is told, from the settings of a release.

    Args:
        spec: the release's settings.
        comparing: how answers of probes are compared. None: they are not, and nothing is said
            about their quality.

    Raises:
        BadInput: the margins contradict each other.
    """
    settings = spec.judge
    metrics = default_metrics()
    if comparing is not None:
        metrics += (quality_metric(comparing),)
    try:
        return JudgeSpec(
            metrics=(
                *(_metric(metric, settings) for metric in metrics),
                *ending_metrics(settings.endings),
            ),
            max_duration_s=spec.max_duration_s,
            block_s=settings.block_s,
            min_requests_per_block=settings.min_requests_per_block,
            min_blocks_last_step=settings.min_blocks_last_step,
            last_weight=spec.steps[-1].weight,
            prompt_drift=settings.prompt_drift,
            prefix_drift=settings.prefix_drift,
            covariance=Covariance().with_block_noise(settings.block_noise),
        )
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise BadInput(
            f"The judge cannot work with the settings of rollout.judge: {first['msg']}.",
            hint="Mend them in the spec and make a new release.",
        ) from error


def _metric(default: MetricSpec, settings: JudgeSettings) -> MetricSpec:
    margins = next((m for name, m in settings.margins.items() if name == default.name), None)
    if margins is None:
        return default
    # Floors are shares of requests. Zero, the settings' default, would make a release that has
    # one failure more than none a harmful one, so it means the documented default here.
    return MetricSpec(
        **{
            **default.model_dump(),
            "harm_margin": margins.harm,
            "promote_margin": margins.promote,
            "harm_floor": margins.harm_floor or default.harm_floor,
            "promote_ceiling": margins.promote_ceiling or default.promote_ceiling,
        }
    )


def _at_equal_load(plan: RolloutPlan) -> JudgeSpec:
    """Return the judge's settings with the last weight at which latencies can be compared.

    Raises:
        BadInput: there is no such step.
    """
    weights = [
        step.weight for index, step in enumerate(plan.steps) if _load(plan, index) <= LOAD_PARITY
    ]
    if not weights:
        raise BadInput(
            f"At {plan.steps[0].weight} % a server of the candidate has far more requests than one "
            "of the stable release, so their latencies cannot be compared.",
            hint="Begin with a smaller step; with equal servers on both sides, at most 50 %.",
        )
    last = max(i for i, step in enumerate(plan.steps) if step.weight == weights[-1])
    return plan.judge.model_copy(
        update={"last_weight": weights[-1], "last_pods": servers_at(plan, last)}
    )


def _load(plan: RolloutPlan, step_index: int) -> float:
    """Return the share of a candidate's server over that of a stable one at a step."""
    weight = plan.steps[step_index].weight
    stables, candidates = servers_at(plan, step_index)
    return (weight / candidates) / ((100 - weight) / stables)


def servers_at(plan: RolloutPlan, step_index: int) -> tuple[int, int]:
    """Return the servers of stable and of the candidate at a step."""
    candidates = candidate_target(plan, step_index)
    stables = plan.stable_replicas
    if plan.capacity == "replace":
        stables = max(1, plan.stable_replicas + 1 - candidates)
    return stables, candidates


def _refuse_if_busy(channel: Channel) -> None:
    rollout = channel.rollout
    if rollout is not None and channel.in_progress:
        raise Busy(
            f"Rollout {rollout.number} of {rollout.release_id} is under way in "
            f"{channel.environment} ({rollout.phase}), driven by {rollout.driver.run_id}.",
            hint="Wait for its end, or end it.",
        )


def _refuse_rejected(channel: Channel, release: Release, *, force: bool, reason: str) -> None:
    rejection = next((r for r in channel.rejected if r.release_id == release.release_id), None)
    if rejection is None:
        return
    if not force:
        raise Refused(
            f"{release.release_id} was rejected in {channel.environment} by rollout "
            f"{rejection.rollout}: {rejection.reason}",
            hint="Promote another release, or force this one and say why.",
        )
    if not reason.strip():
        raise BadInput(
            f"{release.release_id} was rejected; forcing it needs a reason.",
            hint="Say why it is right to promote it now.",
        )


def _refuse_closed(
    release: Release,
    name: str,
    environment: Environment,
    now: datetime,
    *,
    force: bool,
    reason: str,
) -> None:
    """Refuse what would begin in a freeze or in quiet hours."""
    closure = environment.closure(now)
    if closure is None:
        return
    if not force:
        raise Closed(
            f"{release.release_id} cannot be promoted to {name} now: {closure.reason}.",
            until=closure.until,
            hint=f"Promote it after {closure.until:%Y-%m-%d %H:%M} UTC, or force it and say why.",
        )
    if not reason.strip():
        raise BadInput(
            f"{name} takes no promotions now: {closure.reason}; forcing one needs a reason.",
            hint="Say why it cannot wait.",
        )


def recorded_reason(environment: Environment, now: datetime, *, force: bool, reason: str) -> str:
    """Return the reason that the channel's history keeps: also what was overridden by force."""
    closure = environment.closure(now) if force else None
    return f"{reason} (Forced although {closure.reason}.)" if closure else reason


def _refuse_unproven(
    name: str,
    channel: Channel | None,
    release: Release,
    environment: Environment,
    same: Callable[[str], bool],
    now: datetime,
) -> None:
    """Refuse a release that was not stable in a required environment for long enough."""
    soaked_s = _soaked_s(channel, same, now) if channel is not None else None
    if soaked_s is None:
        raise Refused(
            f"{release.release_id} must have been promoted to {name} first.",
            hint=f"Promote it there; {environment.soak_s:g} s later it may come here.",
        )
    if soaked_s < environment.soak_s:
        raise Refused(
            f"{release.release_id} has been stable in {name} for {soaked_s:.0f} s; "
            f"{environment.soak_s:g} s are required.",
            hint=f"Try again in {environment.soak_s - soaked_s:.0f} s.",
        )


def _refuse_unproven_target(
    release: Release,
    name: str,
    environment: Environment,
    proven: Callable[[Target], bool],
    *,
    accepted: bool,
) -> None:
    """Refuse a Neuron target that nobody has proven on a device, where that is asked for."""
    target = release.target
    accepted = accepted or (release.request is not None and release.request.accept_unproven)
    if target.neuron is None or accepted or not environment.takes_only_proven(name):
        return
    if not proven(target):
        raise Refused(
            f"Nobody has proven lane {target.lane} on {target.instance} with the image of "
            f"{release.release_id}, and environment {name} takes only what is proven.",
            hint="Run `trainyard doctor neuron` on such a node, or force it and say why.",
        )


def _soaked_s(channel: Channel, same: Callable[[str], bool], now: datetime) -> float | None:
    """Return how long a release was stable in a channel; None if it never was for good."""
    baked: list[Track] = []
    if channel.stable is not None and not channel.in_progress:
        baked.append(channel.stable)
    elif channel.candidate is not None and _is_baking(channel):
        baked.append(channel.candidate)
    elif channel.stable is not None:
        baked.append(channel.stable)
    baked.extend(channel.previous)
    until = now
    longest: float | None = None
    for track in baked:
        if same(track.release_id):
            longest = max(longest or 0.0, (until - track.since).total_seconds())
        until = track.since
    return longest


def _is_baking(channel: Channel) -> bool:
    return channel.rollout is not None and channel.rollout.phase == "baking"


def _sizes(channel: Channel, spec: RolloutSpec, stable_servers: int) -> tuple[RolloutSpec, int]:
    """Return the settings with the servers that the release needs, and those of the stable one.

    What an autoscaler added to the stable release, the other one needs as well.
    """
    wished = _stable_replicas(channel, spec.replicas)
    if channel.stable is None or stable_servers <= wished:
        return spec, wished
    replicas = max(spec.replicas, stable_servers)
    return spec.model_copy(update={"replicas": replicas}), stable_servers


def _stable_replicas(channel: Channel, default: int) -> int:
    """Return how many servers the stable release has by wish."""
    if channel.stable is None:
        return 0
    before = channel.rollout.replicas.stable if channel.rollout else 0
    return before or default


def _capacity(
    spec: RolloutSpec, environment: Environment, name: str, stable_replicas: int
) -> Capacity:
    """Return the capacity rule: the less generous of what is wanted and what can be given."""
    capacity = min(spec.capacity, environment.capacity, key=_GENEROSITY.index)
    if not stable_replicas:
        needed = spec.replicas
    else:
        needed = {
            "surge": stable_replicas + spec.replicas,
            "replace": max(stable_replicas, spec.replicas) + 1,
            "single": max(stable_replicas, spec.replicas),
        }[capacity]
    if needed > environment.devices:
        raise BadInput(
            f"A rollout with capacity {capacity} needs {needed} devices; {name} has "
            f"{environment.devices}.",
            hint="Use fewer replicas, more devices, or a capacity rule that needs fewer.",
        )
    if capacity == "single" and stable_replicas and not environment.allow_downtime:
        raise BadInput(
            f"Capacity single stops the stable release before the candidate starts, and {name} "
            "does not allow downtime.",
            hint="Set allow_downtime for the environment, or give it a spare device.",
        )
    return capacity
