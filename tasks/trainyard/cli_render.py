"""`trainyard render …`: what a cluster and an AWS account need, printed and never applied."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import typer

from trainyard.console import err, fail, settings
from trainyard.errors import BadInput, TrainyardError

render_app = typer.Typer(
    help="Print what would be applied to a cluster or given to AWS. Nothing is changed.",
    no_args_is_help=True,
)

NamesArgument = Annotated[
    list[str],
    typer.Argument(
        help="Overlays of k8s/overlays, or environments on platform kubernetes. Several are those "
        "of one cluster.",
        show_default=False,
    ),
]


@render_app.command("kubernetes")
def render_kubernetes(names: NamesArgument) -> None:
    """Print the manifests of overlays or environments, exactly as `kubectl apply` takes them."""
    from trainyard.deploy.manifests import to_yaml, together

    try:
        overlays = _overlays(names)
        typer.echo(to_yaml(together(overlays)), nl=False)
    except TrainyardError as error:
        fail(error)
    _warn_of_examples(overlays)


@render_app.command("iam")
def render_iam(names: NamesArgument) -> None:
    """Print the IAM roles of all service accounts and the bucket's policy, as JSON."""
    from trainyard.deploy.manifests import account_of
    from trainyard.deploy.rights import policies

    try:
        overlays = _overlays(names)
        typer.echo(json.dumps(policies(account_of(overlays)), indent=2))
    except TrainyardError as error:
        fail(error)
    _warn_of_examples(overlays)


@render_app.command("rights")
def render_rights(names: NamesArgument) -> None:
    """Print who may write what, in the store and in the cluster, as Markdown."""
    from trainyard.deploy.tables import markdown

    try:
        overlays = _overlays(names)
        typer.echo(markdown([each for overlay in overlays for each in overlay.objects]), nl=False)
    except TrainyardError as error:
        fail(error)


@render_app.command("values")
def render_values(
    chart: Annotated[str, typer.Argument(help="`airflow` or `neuron`.", show_default=False)],
    overlay: Annotated[
        str, typer.Argument(help="Overlay whose values are filled in.", show_default=False)
    ],
) -> None:
    """Print the values of a Helm chart."""
    from trainyard.deploy.manifests import helm_values, load_overlay

    root = settings().manifests
    try:
        loaded = load_overlay(root, overlay)
        typer.echo(helm_values(root, chart, loaded), nl=False)
    except TrainyardError as error:
        fail(error)
    _warn_of_examples([loaded])


@render_app.command("pools")
def render_pools() -> None:
    """Print Airflow's pools for the environments file, as `airflow pools import` takes them."""
    from trainyard.platform.pools import pools_of

    try:
        known = _environments()
    except TrainyardError as error:
        fail(error)
    pools = {
        pool.name: {
            "slots": pool.slots,
            "description": pool.description,
            # The work of a deferred task goes on in its pod.
            "include_deferred": True,
        }
        for pool in pools_of(known.steps if known is not None else None)
    }
    typer.echo(json.dumps(pools, indent=2))


@render_app.command("autoscaler")
def render_autoscaler(
    model: Annotated[str, typer.Argument(help="Name of the model.", show_default=False)],
    environment: Annotated[
        str, typer.Argument(help="Name of the environment.", show_default=False)
    ],
    release: Annotated[
        str, typer.Option(help="Release that it scales. Empty: the channel's stable one.")
    ] = "",
    kind: Annotated[Literal["keda", "hpa"], typer.Option(help="What does it.")] = "keda",
    min_replicas: Annotated[int, typer.Option("--min", help="Servers at least.")] = 1,
    max_replicas: Annotated[int, typer.Option("--max", help="Servers at most.")] = 4,
    prometheus: Annotated[
        str, typer.Option(help="Address of Prometheus, for KEDA.")
    ] = "http://prometheus-operated.monitoring:9090",
) -> None:
    """Print the autoscaler of one channel; rollouts hold it and point it at the new release."""
    from trainyard.deploy.autoscaler import autoscaler
    from trainyard.deploy.manifests import to_yaml

    try:
        scaler = autoscaler(
            settings().manifests,
            kind,
            model=model,
            environment=environment,
            namespace=_namespace_of(environment),
            release_id=release or _stable_release(model, environment),
            min_replicas=min_replicas,
            max_replicas=max_replicas,
            prometheus=prometheus,
        )
        typer.echo(to_yaml([scaler]), nl=False)
    except TrainyardError as error:
        fail(error)


def _environments() -> Any:
    """Return the environments of this installation; None if it has no file of them."""
    from trainyard.spec.loader import load_environments

    path = settings().environments
    return load_environments(path) if path.exists() else None


def _overlays(names: list[str]) -> Any:
    from trainyard.deploy.manifests import load_overlays

    return load_overlays(settings().manifests, names, _environments())


def _namespace_of(environment: str) -> str:
    known = _environments()
    found = known.environments.get(environment) if known is not None else None
    if found is None or found.kubernetes is None:
        raise BadInput(
            f"{environment!r} is no environment on platform kubernetes.",
            hint="The environments file names those that are.",
        )
    return str(found.kubernetes.namespace)


def _stable_release(model: str, environment: str) -> str:
    from trainyard.rollout.channel_store import read_channel
    from trainyard.store.factory import open_store

    channel = read_channel(open_store(settings()), model, environment)
    if channel.stable is None:
        raise BadInput(
            f"The channel {model}/{environment} has no stable release yet.",
            hint="Promote one first, or name one with --release.",
        )
    return str(channel.stable.release_id)


def _warn_of_examples(overlays: Any) -> None:
    examples = [overlay.name for overlay in overlays if overlay.uses_examples]
    if examples:
        err.print(
            f"Values of {', '.join(examples)} are still those of the example: edit "
            "k8s/overlays/<overlay>/parameters/cluster.env before you apply this.",
            style="yellow",
            highlight=False,
        )
