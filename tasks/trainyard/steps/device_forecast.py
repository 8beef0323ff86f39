"""What a plan can tell of the accelerators in the cluster of an environment."""

from __future__ import annotations

from collections.abc import Sequence

from trainyard.documents.forecast import DevicesForecast
from trainyard.errors import TrainyardError
from trainyard.kubernetes.client import Cluster
from trainyard.kubernetes.free_devices import free_devices
from trainyard.kubernetes.step_pod import NEURON
from trainyard.lanes.neuron_common import chips_needed
from trainyard.rollout.channel_store import read_channel
from trainyard.spec.environments import Environment
from trainyard.spec.model import Target
from trainyard.steps.context import StepContext


def devices_forecast(
    context: StepContext,
    model: str,
    name: str,
    environment: Environment,
    targets: Sequence[Target],
) -> DevicesForecast | None:
    """Ask the cluster of an environment how many devices are free for a model's servers.

    A cluster that cannot be asked stops no plan: the forecast then says why nobody knows.

    Args:
        context: the surroundings.
        model: of the release.
        name: of the environment.
        environment: where.
        targets: of the release.

    Returns:
        None where the servers are in no cluster, or need no devices.

    Raises:
        CorruptFile, Transient: the store cannot be read.
    """
    target = next((each for each in targets if each.name == environment.target), None)
    place = environment.kubernetes
    if place is None or target is None or target.neuron is None:
        return None
    stable = read_channel(context.store, model, name).stable
    told = DevicesForecast(instance=target.instance, per_server=chips_needed(target))
    try:
        found = free_devices(
            Cluster.connect(context.settings, place.context),
            place,
            target,
            model=model,
            environment=name,
            stable=stable.release_id if stable is not None else "",
        )
    except TrainyardError as error:
        return told.model_copy(update={"unknown": f"{error.message.rstrip('.')}."})
    if found.nodes and found.silent_nodes == found.nodes:
        why = (
            f"none of the {found.nodes} nodes of {target.instance} says how many {NEURON} it has; "
            "servers need the Neuron device plugin there."
        )
        return told.model_copy(update={"unknown": why})
    return told.model_copy(
        update={
            "nodes": found.nodes,
            "total": found.total,
            "free": found.free,
            "room": found.room,
            "stable_servers": found.stable_servers,
        }
    )
