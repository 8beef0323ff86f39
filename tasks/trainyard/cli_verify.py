"""`trainyard verify`: is the store whole, and does it agree with Airflow and with what serves?"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainyard.console import err, fail, say, settings
from trainyard.errors import BadInput, NotFound, TrainyardError

if TYPE_CHECKING:
    from trainyard.care.agree import Published, Run, Served, World
    from trainyard.care.verify import Problem
    from trainyard.documents.channel import Channel
    from trainyard.settings import Settings
    from trainyard.store.protocol import Store

OpenAirflow = Callable[["Settings"], tuple[Any, str]]
"""Returns a client of the Airflow that the settings name, and its address."""


def verify_command(open_airflow: OpenAirflow) -> Callable[..., None]:
    """Return the command."""

    def verify(
        quick: Annotated[
            bool,
            typer.Option("--quick", help="Do not read the store's files; only compare."),
        ] = False,
        airflow: Annotated[
            bool,
            typer.Option(
                "--airflow/--no-airflow", help="Ask Airflow which runs it knows, or do not."
            ),
        ] = True,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
    ) -> None:
        """Check the store, and whether Airflow and what serves agree with it; exit 10 if not.

        After a restore this says what is inconsistent; docs/operations.md says what to do. It
        changes nothing.
        """
        from trainyard.care.agree import disagreements
        from trainyard.store.factory import open_store

        found = settings()
        try:
            store = open_store(found)
            problems = [] if quick else _verify_bytes(store, found)
            world, unreadable = _look(store, found, open_airflow if airflow else None)
            known = {each.key for each in problems}
            problems += [each for each in unreadable if each.key not in known]
            problems += disagreements(world)
        except TrainyardError as error:
            fail(error)
        wrong = [each for each in problems if each.is_wrong]
        if as_json:
            _print_json(problems)
        else:
            for problem in problems:
                say(f"{problem.kind}: {problem.key}: {problem.message}")
            noun = "problem" if len(wrong) == 1 else "problems"
            asked = "Airflow" if world.runs is not None else "Airflow (not asked)"
            say(f"Store, {asked} and servers: {len(wrong) or 'no'} {noun}.")
        if wrong:
            raise typer.Exit(BadInput.exit_code)

    return verify


def _print_json(problems: Sequence[Problem]) -> None:
    text = json.dumps({"problems": [vars(each) for each in problems]}, indent=2)
    sys.stdout.write(f"{text}\n")


def _verify_bytes(store: Store, found: Settings) -> list[Problem]:
    from trainyard.care.gc import policy_of
    from trainyard.care.verify import Verifier

    return list(Verifier(store, found, policy_of(found)).run().problems)


def _look(
    store: Store, found: Settings, open_airflow: OpenAirflow | None
) -> tuple[World, list[Problem]]:
    """Return what is compared, and the channels that cannot be."""
    from trainyard.care.agree import World
    from trainyard.care.verify import Problem
    from trainyard.rollout.channel_store import list_channels

    listed = list_channels(store)
    channels = listed.channels
    runs, whole = _runs(found, channels, open_airflow)
    world = World(
        channels=channels,
        releases=_releases(store, channels),
        rollouts=_rollouts(store),
        served=_served(found, channels),
        runs=runs,
        whole=whole,
    )
    return world, [Problem(key, "wrong", error.message) for key, error in listed.unreadable.items()]


def _releases(store: Store, channels: Sequence[Channel]) -> tuple[Published, ...]:
    from trainyard.care.agree import Published
    from trainyard.releases import list_releases

    models = {entry.key.split("/")[1] for entry in store.list("releases")}
    models |= {channel.model for channel in channels}
    return tuple(
        Published(each.model, each.release_id, each.provenance.dag_run)
        for model in sorted(models)
        for each in list_releases(store, model)
    )


def _rollouts(store: Store) -> dict[tuple[str, str], int]:
    numbers: dict[tuple[str, str], int] = {}
    for entry in store.list("rollouts"):
        parts = entry.key.split("/")
        if len(parts) > 4 and parts[3].isdigit():
            place = (parts[2], parts[1])
            numbers[place] = max(numbers.get(place, 0), int(parts[3]))
    return numbers


def _served(found: Settings, channels: Sequence[Channel]) -> dict[tuple[str, str], Served]:
    """Return what serves; a channel whose cluster does not answer is left out, and said."""
    from trainyard.care.agree import Served
    from trainyard.wiring import open_serving

    host, router = open_serving(found)
    seen = {}
    for channel in channels:
        place = (channel.environment, channel.model)
        try:
            servers = host.servers(*place)
            route = router.status(*place)
        except TrainyardError as error:
            err.print(f"Nobody could tell what serves {channel.model} in {channel.environment}: "
                      f"{error.message}", markup=False, soft_wrap=True)  # fmt: skip
            continue
        ready: dict[str, int] = {}
        for server in servers:
            if server.state == "ready":
                ready[server.release_id] = ready.get(server.release_id, 0) + 1
        seen[place] = Served(ready, route.channel_generation if route is not None else None)
    return seen


_MOST_RUNS = 1000


def _runs(
    found: Settings, channels: Sequence[Channel], open_airflow: OpenAirflow | None
) -> tuple[tuple[Run, ...] | None, frozenset[str]]:
    """Return the runs that Airflow knows, and the DAGs of which these are all."""
    from trainyard.care.agree import Run

    if open_airflow is None:
        return None, frozenset()
    try:
        api, _ = open_airflow(found)
    except BadInput as error:
        raise NotFound(
            error.message, hint=f"{error.hint} Or leave Airflow out with --no-airflow."
        ) from error
    environments = sorted({channel.environment for channel in channels})
    dag_ids = ["neuron_release"]
    dag_ids += [
        f"neuron_{what}__{each}" for each in environments for what in ("promote", "rollback")
    ]
    runs: list[Run] = []
    whole = set()
    for dag_id in dag_ids:
        known = api.runs(dag_id, most=_MOST_RUNS)
        runs += [Run(dag_id, str(each["dag_run_id"]), str(each["state"])) for each in known]
        if len(known) < _MOST_RUNS:
            whole.add(dag_id)
    return tuple(runs), frozenset(whole)
