"""What the rollouts of a release will take, told before anything is compiled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from trainyard.documents.channel import Channel, RolloutPlan, Track
from trainyard.documents.forecast import DevicesForecast, RolloutForecast, Traffic
from trainyard.documents.look import Look
from trainyard.errors import TrainyardError
from trainyard.rollout.channel_store import channel_keys, read_channel
from trainyard.rollout.forecast import (
    enough_margin,
    enough_probes,
    enough_time,
    rehearse,
    steps_of,
    traffic_of,
)
from trainyard.rollout.plan_rollout import bake_compares_latencies, bake_words, promotion_plan
from trainyard.rollout.probes.windows import lag_s
from trainyard.spec.environments import Environment
from trainyard.spec.metrics import DEVICES_UNSEEN
from trainyard.spec.model import RolloutSpec
from trainyard.store.documents import read_document
from trainyard.store.layout import rollout_prefix
from trainyard.store.protocol import Store

SCARCE = 0.5
"""Share of good releases below which a rollout is no test: most that are good would not pass it."""

UNSURE = 0.8
"""Share of good releases below which people should know."""


def forecast(
    store: Store,
    model: str,
    name: str,
    environment: Environment,
    spec: RolloutSpec,
    *,
    drain_timeout_s: float,
    on_neuron: bool = False,
    devices: DevicesForecast | None = None,
) -> RolloutForecast:
    """Return what promoting a release of `model` will take, as far as that can be told.

    Args:
        store: has the channels and what their last rollouts saw.
        model: of the release.
        name: of the environment.
        environment: where.
        spec: the release's rollout.
        drain_timeout_s: as of the rollout.
        on_neuron: does it serve on Neuron devices?
        devices: what its cluster has of them; None: it needs none, or has no cluster.

    Raises:
        BadInput: the rollout makes no sense, or does not fit there.
        CorruptFile, Transient: the store cannot be read.
    """
    channel = read_channel(store, model, name)
    plan = promotion_plan(channel, spec, environment, drain_timeout_s=drain_timeout_s)
    compared = plan.kind == "canary" and plan.capacity != "single"
    traffic = _traffic(store, channel, spec)
    found = None
    probes, seconds, margin = None, None, None
    if compared and traffic is not None:
        lag = lag_s(environment.metrics)
        found = rehearse(plan, traffic, lag_s=lag)
        if found.promoted_share < UNSURE:
            probes = enough_probes(plan, traffic, share=UNSURE, lag_s=lag)
            seconds = enough_time(plan, traffic, share=UNSURE, lag_s=lag)
            margin = enough_margin(plan, traffic, share=UNSURE, lag_s=lag)
    return RolloutForecast(
        environment=name,
        kind=plan.kind,
        steps=steps_of(plan, traffic.requests_per_s if traffic else None) if compared else (),
        bake_s=plan.bake_s,
        holdback_weight=plan.holdback_weight if compared else None,
        bake_compares_latencies=compared and bake_compares_latencies(plan),
        max_duration_s=plan.max_duration_s,
        servers_needed=_servers_needed(plan),
        servers_free=max(0, environment.devices - _servers_of_others(store, model, name)),
        devices=devices,
        devices_unseen=on_neuron and environment.metrics.source == "scrape",
        traffic=traffic,
        promoted_share=found.promoted_share if found else None,
        probes_per_s=plan.probes.settings.pairs_per_s if plan.probes else None,
        enough_probes_per_s=probes,
        enough_duration_s=seconds,
        enough_promote_margin=margin,
        verdict_median_s=found.median_s if found else None,
        verdict_most_s=found.most_s if found else None,
        verdict_requests=found.candidate_requests if found else None,
    )


def sentences(one: RolloutForecast) -> Iterator[str]:
    """Yield what people should know about a rollout, a line each."""
    bake = f"{one.bake_s:g} s of bake"
    if one.holdback_weight is not None:
        bake = bake_words(one.bake_s, one.holdback_weight, one.bake_compares_latencies)
    rest = (
        f"then {bake}; it needs {one.servers_needed} servers at most, and there "
        f"is room for {one.servers_free}."
    )
    if not one.steps:
        why = "nothing serves there yet" if one.kind == "bootstrap" else "stable stops first"
        yield f"{one.environment}: without comparison ({why}), {rest}"
        yield from _devices_lines(one)
        return
    steps = ", ".join(
        f"{step.weight} % for {step.hold_s:g} s"
        + ("" if step.candidate_requests is None else f" ({step.candidate_requests} requests)")
        for step in one.steps
    )
    yield f"{one.environment}: {steps} at least, {rest}"
    yield from _devices_lines(one)
    if one.traffic is None or one.promoted_share is None:
        yield (
            f"{one.environment}: its traffic is not known, so nobody can say how long a verdict "
            "takes; rollout.expected_rps tells it."
        )
        return
    yield f"{one.environment}: {_verdict(one, one.traffic, one.promoted_share)}"


def _devices_lines(one: RolloutForecast) -> Iterator[str]:
    devices = one.devices
    if devices is None:
        return
    needs = (
        f"{one.environment}: it needs {one.servers_needed * devices.per_server} devices of "
        f"{devices.instance} at most ({devices.per_server} a server)"
    )
    if devices.unknown:
        yield f"{needs}; how many are free is not known: {devices.unknown}"
        return
    held = devices.stable_servers * devices.per_server
    own = f", of which the stable release has {held} already" if held else ""
    yield (
        f"{needs}{own}; {devices.free} of {devices.total} are free on the {devices.nodes} nodes "
        f"that are there now, room for {devices.room} servers more."
    )


def _verdict(one: RolloutForecast, traffic: Traffic, promoted_share: float) -> str:
    seen = (
        f"as seen until {traffic.seen_at:%Y-%m-%d %H:%M} UTC"
        if traffic.seen_at is not None
        else "as rollout.expected_rps says"
    )
    text = f"at {traffic.requests_per_s:.3g} requests a second ({seen}) "
    if one.probes_per_s is not None:
        text += f"and {one.probes_per_s:g} pairs of probes a second "
    if one.verdict_median_s is None:
        text += "fewer than half of all good releases are"
    else:
        text += (
            f"a good release takes about {one.verdict_median_s:g} s and {one.verdict_requests} "
            "requests to be"
        )
        if one.verdict_most_s is not None:
            text += f", and nine in ten at most {one.verdict_most_s:g} s to be"
    return f"{text} proven; {promoted_share:.0%} are in {one.max_duration_s:g} s."


def problems(one: RolloutForecast, spec: RolloutSpec) -> Iterator[str]:
    """Yield why a rollout should not even begin, each as sentences."""
    if _is_scarce(one) and spec.on_scarce_evidence == "refuse":
        yield f"{next(_doubts(one))} {_remedy(one)}"


def warnings(one: RolloutForecast, spec: RolloutSpec) -> Iterator[str]:
    """Yield what may go wrong with a rollout, each as sentences."""
    if not (_is_scarce(one) and spec.on_scarce_evidence == "refuse"):
        for doubt in _doubts(one):
            yield f"{doubt} {_remedy(one)}"
    if one.devices_unseen:
        yield DEVICES_UNSEEN
    if one.servers_needed > one.servers_free:
        yield (
            f"It has room for {one.servers_free} servers beside those of other models, and the "
            f"rollout needs {one.servers_needed}. Free some, or raise `devices` there."
        )
    devices = one.devices
    if devices is not None and not devices.unknown:
        more = one.servers_needed - devices.stable_servers
        if more > devices.room:
            yield (
                f"The {devices.nodes} nodes of {devices.instance} that are there now have "
                f"room for {devices.room} servers more, and the rollout needs {more}. It waits "
                "for devices unless an autoscaler adds nodes (Karpenter, for example): free "
                "some, or add nodes."
            )


def _remedy(one: RolloutForecast) -> str:
    """Return what to do, in lines of the spec: first what was tried and is enough by itself."""
    lines = []
    if one.enough_probes_per_s is not None:
        rate = f"pairs_per_s: {one.enough_probes_per_s:g}"
        # Who probes already, but too little, has the prompts.
        lines.append(
            f"rollout.probes: {{prompts: FILE, {rate}}}"
            if one.probes_per_s is None
            else f"rollout.probes.{rate}"
        )
    if one.enough_duration_s is not None:
        lines.append(f"rollout.max_duration_s: {one.enough_duration_s:g}")
    if one.enough_promote_margin is not None:
        margin = f"promote: {one.enough_promote_margin:g}"
        lines.append(f"rollout.judge.margins with {margin} for ttft and tpot")
    enough = f"Any of these would do: {'; '.join(lines)}. " if lines else ""
    return (
        f"{enough}{'Else begin' if lines else 'Begin'} with larger steps, use more replicas, send "
        "more traffic, or give more rollout.max_duration_s, probes and wider margins together; "
        "rollout.on_scarce_evidence: warn goes on all the same."
    )


def _doubts(one: RolloutForecast) -> Iterator[str]:
    if one.promoted_share is not None and one.promoted_share < UNSURE:
        yield (
            f"Only {one.promoted_share:.0%} of all releases that are as good as the stable one of "
            f"{one.environment} could be proven so in {one.max_duration_s:g} s at its traffic."
        )


def _is_scarce(one: RolloutForecast) -> bool:
    return one.promoted_share is not None and one.promoted_share < SCARCE


def _servers_needed(plan: RolloutPlan) -> int:
    if plan.kind == "bootstrap":
        return plan.replicas
    if plan.capacity == "surge":
        return plan.stable_replicas + plan.replicas
    return max(plan.stable_replicas, plan.replicas) + (plan.capacity == "replace")


def _servers_of_others(store: Store, model: str, environment: str) -> int:
    """Return the servers that other models' channels in an environment have by wish."""
    total = 0
    for key in channel_keys(store):
        owner, name = key.split("/")[1:]
        if owner == model or name != f"{environment}.json":
            continue
        try:
            channel = read_document(store, key, Channel)
        except TrainyardError:
            # Of somebody else, and unreadable: not this release's matter.
            continue
        total += _servers_of(channel)
    return total


def _servers_of(channel: Channel) -> int:
    rollout = channel.rollout
    if rollout is None:
        return _at_least_one(channel.stable)
    candidate = rollout.replicas.candidate if channel.in_progress else 0
    return max(_at_least_one(channel.stable), rollout.replicas.stable) + candidate


def _at_least_one(track: Track | None) -> int:
    return int(track is not None)


def _traffic(store: Store, channel: Channel, spec: RolloutSpec) -> Traffic | None:
    if spec.expected_rps is not None:
        return Traffic(requests_per_s=spec.expected_rps)
    if channel.rollout is None:
        return None
    folder = f"{rollout_prefix(channel.model, channel.environment, channel.rollout.number)}/looks"
    keys = [entry.key for entry in store.list(folder)]
    # The first and the last tell the most; where the router was restarted, the last two.
    for chosen in (keys[:1] + keys[-1:], keys[-2:]):
        looks: Sequence[Look] = [read_document(store, key, Look) for key in dict.fromkeys(chosen)]
        if (found := traffic_of([look.snapshot for look in looks])) is not None:
            return found
    return None
