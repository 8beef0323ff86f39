"""What would be applied to a cluster: overlays of `k8s/`, rendered and checked.

An overlay is a folder below `k8s/overlays`; its `parameters/cluster.env` says what differs between
clusters. An environment of the environments file is rendered by the overlay of its name, or by the
one that makes its namespace.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import yaml

from trainyard.deploy.kustomize import Object, build, identity, read_env
from trainyard.deploy.rights import Account
from trainyard.errors import BadInput, NotFound
from trainyard.spec.environments import Environments
from trainyard.spec.kubernetes import KubernetesServing, KubernetesSteps

EXAMPLE_ACCOUNT = "111122223333"
"""Account id of the examples, which nobody has."""

AIRFLOW_NAMESPACE = "trainyard-airflow"
STEPS_NAMESPACE = "trainyard-steps"

_PARAMETERS = Path("parameters/cluster.env")


@dataclass(frozen=True)
class Overlay:
    """One overlay, rendered."""

    name: str
    parameters: Mapping[str, str]
    """The values of its cluster.env."""
    objects: tuple[Object, ...]

    def parameter(self, name: str) -> str:
        """Return a value of its cluster.env. Raises BadInput."""
        try:
            return self.parameters[name]
        except KeyError as error:
            raise BadInput(
                f"Overlay {self.name} has no value {name!r}.",
                hint=f"Write `{name}=…` into k8s/overlays/{self.name}/{_PARAMETERS}.",
            ) from error

    @property
    def uses_examples(self) -> bool:
        """Are the values still those of the examples?"""
        return any(EXAMPLE_ACCOUNT in value for value in self.parameters.values())

    def names(self, kind: str, namespace: str) -> set[str]:
        """Return the names of its objects of a kind in a namespace."""
        found = (identity(each) for each in self.objects)
        return {name for _, of, where, name in found if (of, where) == (kind, namespace)}


def load_overlay(root: Path, name: str) -> Overlay:
    """Render an overlay.

    Args:
        root: the folder `k8s`.
        name: of the overlay.

    Raises:
        NotFound: there is none of that name.
        BadInput: it cannot be rendered.
    """
    known = overlay_names(root)
    if name not in known:
        raise NotFound(
            f"There is no overlay {name!r} in {root / 'overlays'}.",
            hint=f"There are: {', '.join(known)}.",
        )
    folder = root / "overlays" / name
    return Overlay(name, read_env(folder / _PARAMETERS), tuple(build(folder)))


def overlay_names(root: Path) -> list[str]:
    """Return the names of all overlays. Raises BadInput if `root` is no folder of ours."""
    if not (root / "overlays").is_dir():
        raise BadInput(
            f"{root} has no folder `overlays`.",
            hint="Run this in a checkout of Trainyard, or set TRAINYARD_MANIFESTS to its k8s/.",
        )
    return sorted(each.name for each in (root / "overlays").iterdir() if each.is_dir())


def load_overlays(
    root: Path, names: Sequence[str], environments: Environments | None
) -> list[Overlay]:
    """Render what `names` mean: overlays, or environments whose servers run in a cluster.

    Raises:
        NotFound: a name is neither.
        BadInput: an overlay cannot be rendered, or does not have what its environment names.
    """
    known = overlay_names(root)
    chosen: dict[str, Overlay] = {}
    for name in names:
        serving = _serving(environments, name)
        overlay_name = name if name in known else _with_namespace(root, known, serving)
        if overlay_name is None:
            raise NotFound(
                f"{name!r} is neither an overlay nor an environment on platform kubernetes.",
                hint=f"Overlays: {', '.join(known)}.",
            )
        overlay = chosen.get(overlay_name) or load_overlay(root, overlay_name)
        if serving is not None:
            _check_serving(name, serving, overlay)
        chosen[overlay_name] = overlay
    if environments is not None and environments.steps is not None:
        _check_steps(environments.steps, list(chosen.values()))
    return list(chosen.values())


def _serving(environments: Environments | None, name: str) -> KubernetesServing | None:
    known = environments.environments if environments is not None else {}
    return known[name].kubernetes if name in known else None


def _with_namespace(
    root: Path, overlays: Sequence[str], serving: KubernetesServing | None
) -> str | None:
    """Return the one overlay that makes an environment's namespace."""
    fitting = [
        name
        for name in overlays
        if serving is not None
        and read_env(root / "overlays" / name / _PARAMETERS).get("namespace") == serving.namespace
    ]
    return fitting[0] if len(fitting) == 1 else None


def _check_serving(name: str, serving: KubernetesServing, overlay: Overlay) -> None:
    """Raise BadInput if the environment names what its overlay does not make."""
    namespace = serving.namespace
    wanted = [
        ("Namespace", "", namespace),
        ("ServiceAccount", namespace, serving.service_account),
        ("PriorityClass", "", serving.stable_priority_class),
        ("PriorityClass", "", serving.candidate_priority_class),
    ]
    if serving.data_plane == "gateway":
        wanted.append(("Gateway", serving.gateway_namespace or namespace, serving.gateway))
    _demand(f"Environment {name}", wanted, overlay)


def _check_steps(steps: KubernetesSteps, overlays: Sequence[Overlay]) -> None:
    accounts = {steps.service_account, *steps.service_accounts.values()}
    wanted = [
        ("Namespace", "", steps.namespace),
        *(("ServiceAccount", steps.namespace, each) for each in sorted(accounts)),
        ("PriorityClass", "", steps.measure_priority_class),
        ("PriorityClass", "", steps.compile_priority_class),
    ]
    for overlay in overlays:
        _demand("Steps of the environments file", wanted, overlay)


def _demand(who: str, wanted: Sequence[tuple[str, str, str | None]], overlay: Overlay) -> None:
    for kind, namespace, name in wanted:
        if name is not None and name not in overlay.names(kind, namespace):
            place = f" in namespace {namespace}" if namespace else ""
            raise BadInput(
                f"{who} names the {kind} {name}{place}, and overlay {overlay.name} has none.",
                hint="Give both the same name: in the environments file, or in k8s/.",
            )


def together(overlays: Sequence[Overlay]) -> list[Object]:
    """Return the objects of several overlays of one cluster, those they share once.

    Raises:
        BadInput: they do not agree about one of them.
    """
    found: dict[tuple[str, str, str, str], tuple[Object, str]] = {}
    for overlay in overlays:
        for each in overlay.objects:
            known, first = found.setdefault(identity(each), (each, overlay.name))
            if known != each:
                raise BadInput(
                    f"Overlays {first} and {overlay.name} do not agree about "
                    f"{each['kind']} {each['metadata']['name']}.",
                    hint="In one cluster, give both the same values; else render them apart.",
                )
    return [each for each, _ in found.values()]


def to_yaml(objects: Sequence[Object]) -> str:
    """Return objects as a file of manifests; the same objects always give the same text."""
    return yaml.safe_dump_all(objects, sort_keys=True, width=100, allow_unicode=True)


def account_of(overlays: Sequence[Overlay]) -> Account:
    """Return the AWS account and the clusters that overlays describe.

    Raises:
        BadInput: a value is missing, or they do not share one store.
    """
    first = overlays[0]
    for name in ("store", "region", "roles"):
        values = {overlay.parameter(name) for overlay in overlays}
        if len(values) > 1:
            raise BadInput(
                f"Overlays {', '.join(each.name for each in overlays)} differ in {name!r}.",
                hint="Policies are made for one store; render them apart.",
            )
    store = first.parameter("store")
    bucket, _, prefix = store.removeprefix("s3://").strip("/").partition("/")
    if not store.startswith("s3://") or not bucket:
        raise BadInput(f"The store {store!r} is no bucket.", hint="Write s3://bucket/prefix.")
    if not first.parameter("roles").startswith("arn:"):
        raise BadInput(
            f"`roles` is {first.parameter('roles')!r}, not the beginning of a role's ARN.",
            hint="Write arn:aws:iam::<account>:role/<cluster>.",
        )
    return Account(
        bucket=bucket,
        prefix=prefix,
        region=first.parameter("region"),
        roles=first.parameter("roles"),
        clusters=tuple(
            (
                each.parameter("oidc_provider"),
                {
                    "steps": STEPS_NAMESPACE,
                    "airflow": AIRFLOW_NAMESPACE,
                    "serving": each.parameter("namespace"),
                },
            )
            for each in overlays
        ),
        store_kms_key=first.parameters.get("store_kms_key", ""),
        signing_kms_key=first.parameters.get("signing_kms_key", ""),
        logs=first.parameters.get("airflow_logs", "").removeprefix("s3://").strip("/"),
    )


def helm_values(root: Path, chart: str, overlay: Overlay) -> str:
    """Return the values of a Helm chart with the overlay's own filled in.

    Raises:
        NotFound: there are no values for that chart.
        BadInput: the overlay lacks a value.
    """
    known = sorted(each.stem for each in (root / "helm").glob("*.yaml"))
    if chart not in known:
        raise NotFound(f"There are no values for {chart!r}.", hint=f"Charts: {', '.join(known)}.")
    return filled(root / "helm" / f"{chart}.yaml", overlay.parameters)


def filled(path: Path, values: Mapping[str, Any]) -> str:
    """Return a file with `${name}` replaced. Raises BadInput if a value is missing."""
    try:
        return Template(path.read_text(encoding="utf-8")).substitute(values)
    except KeyError as error:
        raise BadInput(
            f"{path.name} needs a value {error.args[0]!r}.",
            hint="Add it to the overlay's cluster.env.",
        ) from error
    except ValueError as error:
        raise BadInput(f"{path.name} cannot be filled in: {error}.") from error
