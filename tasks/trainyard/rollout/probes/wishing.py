"""What a rollout's driver wants of the prober, at every tick."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from trainyard.documents.channel import EXPOSED_PHASES, Channel, Rollout
from trainyard.errors import TrainyardError
from trainyard.rollout.deps import RolloutDeps
from trainyard.rollout.probes.prober import Wish
from trainyard.rollout.probes.windows import Windows, lag_s
from trainyard.serving.protocol import ServerStatus

log = logging.getLogger(__name__)


def rollout_name(channel: Channel, rollout: Rollout) -> str:
    """Return the name under which a prober knows a rollout."""
    return f"{channel.model}/{channel.environment}/{rollout.number}"


def begin(
    deps: RolloutDeps, channel: Channel, rollout: Rollout, servers: Sequence[ServerStatus]
) -> None:
    """Have counters from now on, so that this look shows that there were no probes before."""
    if deps.prober.read(rollout_name(channel, rollout)) is None:
        wish = _wish(deps, channel, rollout, servers, send_s=0.0)
        if wish is not None:
            deps.prober.keep(wish)


def go_on(
    deps: RolloutDeps,
    channel: Channel,
    rollout: Rollout,
    servers: Sequence[ServerStatus],
    *,
    slot: int,
    left_s: float,
) -> None:
    """Let probes be sent if this slice has any. After a look, so that it cannot see them yet.

    It is `begin` that begins; without it nothing is sent. What ends, or has no two releases that
    are ready, is not probed from now on.

    Args:
        deps: the world.
        channel: with the rollout.
        rollout: under way.
        servers: all servers of the model in the environment.
        slot: number of the present slice.
        left_s: seconds to its end.
    """
    name = rollout_name(channel, rollout)
    if deps.prober.read(name) is None:
        return
    windows = _windows(deps, channel, rollout)
    slowest_s = deps.prober.slowest_s(name)
    send_s = windows.sending_s(slot, left_s, slowest_s=slowest_s)
    # Whoever has lost the lease drives no more.
    wish = _wish(deps, channel, rollout, servers, send_s=min(send_s, rollout.plan.lease_s))
    if wish is None:
        deps.prober.stop()
    else:
        deps.prober.keep(wish)


def _windows(deps: RolloutDeps, channel: Channel, rollout: Rollout) -> Windows:
    metrics = deps.environment(channel.environment).metrics
    return Windows(rollout.plan.judge.block_s, lag_s(metrics))


def _wish(
    deps: RolloutDeps,
    channel: Channel,
    rollout: Rollout,
    servers: Sequence[ServerStatus],
    *,
    send_s: float,
) -> Wish | None:
    """Return what is wanted; None if there are to be no probes, or cannot be any."""
    plan = rollout.plan.probes
    exposed = rollout.phase in EXPOSED_PHASES and rollout.exposed_since is not None
    if plan is None or not exposed or rollout.ending is not None:
        return None
    ready = [server for server in servers if server.state == "ready" and server.url]
    stable = [server for server in ready if server.release_id == rollout.reference_id]
    candidate = [server for server in ready if server.release_id == rollout.release_id]
    if not stable or not candidate:
        return None
    try:
        release = deps.release(channel.model, rollout.release_id)
        prompts = deps.prompts(release)
        name = rollout_name(channel, rollout)
        begun = deps.prober.read(name) is not None
        return Wish(
            rollout=name,
            plan=plan,
            prompts=prompts,
            model=release.served_model_name,
            stable=stable,
            candidate=candidate,
            cursor=0 if begun else _cursor(deps, channel, rollout),
            send_s=send_s,
            rounds_per_s=plan.settings.pairs_per_s * _windows(deps, channel, rollout).pace,
        )
    except (TrainyardError, OSError) as error:
        log.warning("%s has no probes now: %s", rollout_name(channel, rollout), error)
        return None


def _cursor(deps: RolloutDeps, channel: Channel, rollout: Rollout) -> int:
    """Return how many prompts were sent already, as far as looks know."""
    looks = deps.looks.read(channel.model, channel.environment, rollout.number)
    return max((one.snapshot.probes.cursor for one in looks if one.snapshot.probes), default=0)
