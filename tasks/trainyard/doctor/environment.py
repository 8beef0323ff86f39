"""`trainyard doctor ENVIRONMENT`: looks at everything that an environment rests on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from trainyard.doctor.cluster_checks import Served, cluster_checks
from trainyard.doctor.local_checks import local_checks
from trainyard.doctor.metrics_checks import metrics_checks
from trainyard.doctor.report import Check, fail, guarded, ok, warn
from trainyard.doctor.split import REQUESTS, http_sender, split_checks
from trainyard.doctor.store_checks import store_checks
from trainyard.documents.channel import Channel
from trainyard.errors import BadInput, NotFound
from trainyard.kubernetes.client import Cluster
from trainyard.platform.airflow_api import AirflowApi
from trainyard.platform.pools import pools_of
from trainyard.proofs import Proofs, read_proofs
from trainyard.serving.kubernetes.route_status import KubernetesRouter
from trainyard.serving.local_router import LocalRouter
from trainyard.serving.protocol import Router
from trainyard.settings import Settings
from trainyard.signing.keys import trusted_keys
from trainyard.spec.environments import Environment
from trainyard.spec.kubernetes import KubernetesSteps
from trainyard.spec.loader import Catalogue, load_environments
from trainyard.spec.sentences import choose
from trainyard.steps.plan import check_files_with_lanes
from trainyard.store.documents import read_document
from trainyard.store.factory import open_store
from trainyard.store.layout import channel_key
from trainyard.store.protocol import Store


@dataclass(frozen=True)
class Wanted:
    """What the doctor is to look at."""

    environment: str
    identity: str = ""
    """Whose rights on the store to compare; empty: none."""
    cluster_identity: str = "rollout"
    """Whose rights in the cluster these should be."""
    url: str = ""
    """Address of the gateway or proxy, to try the split; empty: not tried."""
    requests: int = REQUESTS
    airflow: bool = True
    """Look at Airflow too?"""


Connect = Callable[[Settings, str], Cluster]


def examine(
    settings: Settings,
    wanted: Wanted,
    *,
    connect: Connect = Cluster.connect,
    airflow: Callable[[Settings], AirflowApi] | None = None,
) -> Iterator[Check]:
    """Yield one check after the other, as they are made.

    Args:
        settings: of this installation.
        wanted: what to look at.
        connect: opens the cluster of an environment.
        airflow: opens the Airflow that the settings name; None: it is not looked at.

    Raises:
        NotFound, BadInput: there is no such environment, or the environments file cannot be read.
    """
    file = load_environments(settings.environments)
    environment = _environment(file.environments, wanted.environment)
    yield ok("settings", f"{settings.environments} has environment {wanted.environment}.")
    served: list[Served] = []
    yield from _catalogue(settings, wanted.environment, environment, served)
    stores: list[Store] = []
    yield from guarded("store", lambda: _store(settings, wanted.identity, stores))
    yield from guarded("signing", lambda: _signing(settings))
    proofs = Proofs(())
    if stores:
        yield from guarded("proofs", lambda: _proofs(stores[0], settings, served))
        proofs = read_proofs(stores[0], settings)
    place = environment.kubernetes
    router: Router = LocalRouter(settings)
    if environment.platform == "kubernetes" and place is not None:
        clusters: list[Cluster] = []

        def look() -> Iterator[Check]:
            cluster = connect(settings, place.context)
            clusters.append(cluster)
            yield from cluster_checks(
                cluster, wanted.environment, environment, place, served, proofs,
                identity=wanted.cluster_identity,
            )  # fmt: skip

        yield from guarded("cluster", look)
        if clusters:
            router = KubernetesRouter(clusters[0], place)
    else:
        yield from local_checks(settings, served)
    on_neuron = any(each.target.neuron is not None for each in served)
    yield from guarded("metrics", lambda: metrics_checks(environment.metrics, on_neuron=on_neuron))
    if wanted.url and stores:
        for each in served:
            yield from _split(stores[0], router, wanted, each.model)
    elif not wanted.url:
        yield warn(
            "traffic",
            "Whether the gateway really splits was not tried.",
            "Name its address with --url, best during a canary.",
        )
    if wanted.airflow and airflow is not None:
        yield from guarded("airflow", lambda: _airflow(airflow(settings), file.steps))


def _environment(environments: Mapping[str, Environment], name: str) -> Environment:
    if name not in environments:
        raise NotFound(f"There is no environment {name!r}.", hint=choose(name, list(environments)))
    return environments[name]


def _catalogue(
    settings: Settings, name: str, environment: Environment, served: list[Served]
) -> Iterator[Check]:
    """Yield how the specs stand, and add the models that the environment serves to `served`."""
    catalogue = Catalogue(settings.catalogue)
    problems = check_files_with_lanes([*catalogue.paths(), settings.environments])
    if problems:
        first = problems[0]
        yield fail(
            "catalogue",
            f"{len(problems)} problems, the first in {first.file}:{first.line}: {first.message}",
            "`trainyard check` names all of them.",
        )
    else:
        yield ok("catalogue", f"{len(catalogue.paths())} specs without a problem.")
    for model in catalogue.names():
        try:
            targets = catalogue.load(model).targets
        except BadInput:
            continue
        served += [Served(model, each) for each in targets if each.name == environment.target]
    if not served and not problems:
        yield warn(
            "catalogue",
            f"No model has target {environment.target!r}, which {name} serves.",
            "Add the target to a model, or correct the environment.",
        )


def _store(settings: Settings, identity: str, stores: list[Store]) -> Iterator[Check]:
    store = open_store(settings)
    stores.append(store)
    yield from store_checks(store, identity)


def _signing(settings: Settings) -> Iterator[Check]:
    keys = trusted_keys(settings).keys
    valid = [key for key in keys if key.state == "valid"]
    if not valid:
        yield warn(
            "signing",
            "No key is trusted here, so no release can be verified.",
            "Publish once here, or bring the public key: `trainyard keys add`.",
        )
        return
    names = ", ".join(f"{key.short_id} ({key.comment or 'no comment'})" for key in valid)
    yield ok("signing", f"{len(valid)} trusted keys: {names}.")
    if settings.signing_kms_key and not any(key.kms_key for key in valid):
        yield warn(
            "signing",
            f"{settings.signing_kms_key} signs here, and no trusted key is known to be its.",
            "`trainyard keys add --kms` fetches its public key.",
        )


def _proofs(store: Store, settings: Settings, served: list[Served]) -> Iterator[Check]:
    proofs = read_proofs(store, settings)
    for reason in proofs.ignored:
        yield warn("proofs", reason, "Look who wrote it; add the key if you trust it.")
    for target in {each.target.name: each.target for each in served}.values():
        if target.neuron is None:
            continue
        proof = proofs.of(target)
        what = f"lane {target.lane} on {target.instance} with {target.neuron.image or 'no image'}"
        if proof is None:
            yield warn("proofs", f"Nobody has proven {what}.", "Run `trainyard doctor neuron`.")
        else:
            yield ok("proofs", f"{what}: proven on {proof.created_at:%Y-%m-%d}.")


def _split(store: Store, router: Router, wanted: Wanted, model: str) -> Iterator[Check]:
    try:
        channel = read_document(store, channel_key(model, wanted.environment), Channel)
    except NotFound:
        yield warn(
            "traffic",
            f"{model} has no channel in {wanted.environment} yet.",
            "Promote a release first, then look again.",
        )
        return
    if channel.stable is None:
        yield warn("traffic", f"{model} serves nothing in {wanted.environment} yet.")
        return
    yield from split_checks(
        lambda: router.status(wanted.environment, model),
        http_sender(wanted.url),
        stable=channel.stable.release_id,
        requests=wanted.requests,
    )


def _airflow(api: AirflowApi, steps: KubernetesSteps | None) -> Iterator[Check]:
    for dag_id in ("neuron_release",):
        answer = api.request("GET", f"/api/v2/dags/{dag_id}")
        if answer.status_code != 200:
            yield fail(
                "airflow",
                f"Airflow does not know {dag_id} (answer {answer.status_code}).",
                "Look at its import errors; the DAG bundle may not have arrived.",
            )
            return
    yield ok("airflow", "It answers and knows neuron_release.")
    for pool in pools_of(steps):
        answer = api.request("GET", f"/api/v2/pools/{pool.name}")
        if answer.status_code != 200:
            yield fail(
                "airflow: pools",
                f"There is no pool {pool.name}: tasks that ask for it wait forever.",
                f"Make it with {pool.slots} slots that count deferred tasks. {pool.description}",
            )
        elif not answer.json().get("include_deferred"):
            yield warn(
                "airflow: pools",
                f"Pool {pool.name} does not count deferred tasks, whose pods hold devices.",
                "Set include_deferred.",
            )
        else:
            yield ok("airflow: pools", f"{pool.name} has {answer.json().get('slots')} slots.")
