"""Published and promoted releases as Airflow assets, so that other DAGs can start after them.

Which models there are is known only when a task runs, so tasks have an alias as their outlet and
add the asset of the model. A DAG can be scheduled by the alias (every model) or by the asset (one).
Events tell that something is there; what an environment serves now, its channel tells.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from airflow.sdk import Asset, AssetAlias

if TYPE_CHECKING:
    from trainyard.settings import Settings
    from trainyard.store.protocol import Store

GROUP = "trainyard"

PUBLISHED = AssetAlias("trainyard-published", group=GROUP)
"""Has an event for each release that `neuron_release` publishes."""


def promoted(environment: str) -> AssetAlias:
    """Return the alias with an event for each promotion to an environment."""
    return AssetAlias(f"trainyard-promoted-{environment}", group=GROUP)


def published_asset(model: str) -> Asset:
    """Return the releases of a model."""
    return Asset(f"trainyard/{model}", uri=f"x-trainyard://releases/{model}", group=GROUP)


def promoted_asset(model: str, environment: str) -> Asset:
    """Return what an environment serves of a model."""
    return Asset(
        f"trainyard/{model}/{environment}",
        uri=f"x-trainyard://serving/{environment}/{model}",
        group=GROUP,
    )


def release_extra(
    store: Store, settings: Settings, model: str, release_id: str, *, environment: str = ""
) -> dict[str, Any]:
    """Return what an event says of a release: enough to fetch and to verify it.

    Args:
        store: where the release is.
        settings: of this installation.
        model: of the release.
        release_id: which.
        environment: where it was promoted to, if it was.
    """
    from trainyard.releases import load_release
    from trainyard.store.layout import release_key

    release = load_release(store, model, release_id, settings)
    key = release_key(model, release_id)
    extra = {
        "model": model,
        "release": release_id,
        "environment": environment,
        "target": release.target.name,
        "revision": release.revision,
        "key": key,
        "digest": f"sha256:{hashlib.sha256(store.read(key).data).hexdigest()}",
        "checkpoint_digest": release.checkpoint_digest,
    }
    return {name: value for name, value in extra.items() if value}
