"""`trainyard doctor …`: look before work starts, and prove what runs on a device."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from trainyard.console import err, fail, out, say, settings, show
from trainyard.errors import BadInput, TrainyardError

if TYPE_CHECKING:
    from trainyard.doctor.report import Check
    from trainyard.platform.airflow_api import AirflowApi
    from trainyard.settings import Settings

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


class _Doctor(TyperGroup):
    """What is the name of no command is the name of an environment."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the command's name in front of what is none."""
        if not args or (args[0] not in self.commands and args[0] not in ("-h", "--help")):
            args = ["environment", *args]
        return super().parse_args(ctx, args)


doctor_app = typer.Typer(
    cls=_Doctor,
    help="Look what an environment lacks (`trainyard doctor ENVIRONMENT`), and prove what runs on "
    "a device.",
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@doctor_app.command()
def environment(
    name: Annotated[
        str, typer.Argument(help="The environment. Empty: all of them.", show_default=False)
    ] = "",
    url: Annotated[
        str,
        typer.Option(
            help="Address of its gateway or proxy: tries whether traffic is really split.",
            show_default=False,
        ),
    ] = "",
    requests: Annotated[int, typer.Option(min=50, help="With --url: requests of each kind.")] = 500,
    identity: Annotated[
        str,
        typer.Option(
            help="Whose rights on the store to compare: the name of a role of docs/rights.md "
            "without `trainyard-`, such as compile or guard. Empty: none.",
            show_default=False,
        ),
    ] = "",
    cluster_identity: Annotated[
        Literal["rollout", "guard"], typer.Option(help="Whose rights in the cluster to compare.")
    ] = "rollout",
    airflow: Annotated[
        bool, typer.Option("--airflow/--no-airflow", help="Look at Airflow and its pools too.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Look at store, keys, cluster, gateway, devices, driver, images and Airflow.

    Exits with 0 if nothing fails, with 30 if only what may pass by itself does, else with 10.
    """
    from trainyard.doctor.environment import Wanted, examine
    from trainyard.doctor.report import exit_code
    from trainyard.doctor.store_checks import WRITERS
    from trainyard.spec.loader import load_environments

    found = settings()
    try:
        if identity and identity not in WRITERS:
            raise BadInput(
                f"There is no identity {identity!r}.", hint=f"Known: {', '.join(WRITERS)}."
            )
        names = [name] if name else list(load_environments(found.environments).environments)
        every: list[Check] = []
        for each in names:
            if not as_json and len(names) > 1:
                say(f"Environment {each}")
            wanted = Wanted(
                each,
                identity=identity,
                cluster_identity=cluster_identity,
                url=url,
                requests=requests,
                airflow=airflow,
            )
            every += _told(examine(found, wanted, airflow=_airflow), quiet=as_json)
    except TrainyardError as error:
        fail(error)
    if as_json:
        _print_json([asdict(check) for check in every])
    else:
        _sum_up(every)
    raise typer.Exit(exit_code(every))


@doctor_app.command()
def table(
    image: Annotated[
        list[str] | None, typer.Option(help="Only this image; may be repeated.")
    ] = None,
    instance: Annotated[str, typer.Option(help="Only this instance type.")] = "",
    driver: Annotated[str, typer.Option(help="Only this version of the host's driver.")] = "",
    lane: Annotated[str, typer.Option(help="Only this lane.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Print image, driver, instance and lane: proven, unproven or refused, with the source."""
    from trainyard.lanes.neuron_support import AS_OF, REPOSITORY
    from trainyard.proofs import read_proofs
    from trainyard.store.factory import open_store
    from trainyard.support import table as rows_of

    found = settings()
    try:
        proofs = read_proofs(open_store(found), found)
    except TrainyardError as error:
        fail(error)
    rows = rows_of(proofs, images=tuple(image or ()), instance=instance, driver=driver, lane=lane)
    if as_json:
        _print_json([asdict(row) for row in rows])
        return
    shown = Table()
    for title in ("Image", "Driver", "Instance", "Lane", "State", "Why", "Source"):
        shown.add_column(title, overflow="fold")
    for row in rows:
        name = row.image.removeprefix(f"{REPOSITORY}:")
        shown.add_row(name, row.drivers, row.instance, row.lane, row.state, row.reason, row.source)
    show(shown)
    for reason in proofs.ignored:
        say(f"Warning: {reason}")
    say(f"{len(rows)} rows; what is known is of {AS_OF}.")


@doctor_app.command()
def neuron(
    model: Annotated[
        str,
        typer.Argument(
            help="A small model of the catalogue; `trainyard presets write` makes one.",
            show_default=False,
        ),
    ],
    target: Annotated[
        str, typer.Option(help="Its target. Empty: its only one.", show_default=False)
    ] = "",
    revision: Annotated[str, typer.Option(help="Its revision. Empty: the spec's.")] = "",
    max_minutes: Annotated[
        float, typer.Option(min=1, help="After so many minutes nothing new is begun.")
    ] = 120.0,
    out_file: Annotated[
        Path | None,
        typer.Option("--out", help="Write the signed transcript here too.", show_default=False),
    ] = None,
    store: Annotated[
        bool,
        typer.Option("--store/--no-store", help="Sign the transcript and put it into the store."),
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Prove on this node that the image compiles, restores, starts from its bundle and drains.

    Run it in the target's image on a node of its instance type. Exits with 0 if the image is proven
    there, with 20 if it is not; the transcript says why.
    """
    from trainyard.doctor.neuron import Wanted, prove, refuse_without_device
    from trainyard.documents.proof import payload_of_proof
    from trainyard.errors import Refused
    from trainyard.proofs import store_proof
    from trainyard.signing.envelope import seal
    from trainyard.signing.keys import signing_key
    from trainyard.spec.loader import Catalogue
    from trainyard.store.factory import open_store

    found = settings()
    try:
        spec = Catalogue(found.catalogue).load(model)
        names = [each.name for each in spec.targets]
        if not target and len(names) != 1:
            raise BadInput(f"{model} has several targets.", hint=f"Name one: {', '.join(names)}.")
        chosen = next((each for each in spec.targets if each.name == (target or names[0])), None)
        if chosen is None:
            raise BadInput(f"{model} has no target {target!r}.", hint=f"It has {', '.join(names)}.")
        refuse_without_device(found, chosen)
        # Looked at first: after two hours a key that cannot sign would come too late.
        key = signing_key(found) if store or out_file else None
        place = open_store(found) if store else None
        wanted = Wanted(model, chosen.name, revision or None, max_minutes * 60)
        proof = prove(found, wanted, _Aloud(quiet=as_json))
        if out_file is not None and key is not None:
            out_file.write_bytes(seal(payload_of_proof(proof), key))
        stored = store_proof(place, proof, key) if place is not None and key is not None else ""
    except TrainyardError as error:
        fail(error)
    if as_json:
        sys.stdout.write(proof.model_dump_json(by_alias=True, indent=2) + "\n")
    else:
        if stored:
            say(f"The signed transcript is {stored}.")
        words = "is proven" if proof.proven else "is not proven"
        say(f"Lane {proof.lane} on {proof.instance} with {proof.image or 'this machine'} {words}.")
    raise typer.Exit(0 if proof.proven else Refused.exit_code)


class _Aloud:
    """Progress that goes to the terminal."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet

    def say(self, message: str) -> None:
        """Print a line, to standard error where the output is for programs."""
        (err if self._quiet else out).print(message, markup=False, highlight=False, soft_wrap=True)

    def fraction(self, done: float, message: str = "") -> None:
        """Say nothing: the steps are lines enough."""


def _told(checks: Iterable[Check], *, quiet: bool) -> list[Check]:
    """Return all checks, each printed as it is made."""
    found = []
    for check in checks:
        found.append(check)
        if quiet:
            continue
        mark = f"[{_COLOURS[check.state]}]{check.state:>4}[/]"
        line = f"{mark}  {escape(check.name)}: {escape(check.found)}"
        out.print(line, highlight=False, soft_wrap=True)
        if check.remedy:
            out.print(f"      {escape(check.remedy)}", highlight=False, soft_wrap=True)
    return found


def _sum_up(checks: list[Check]) -> None:
    counts = {
        state: sum(check.state == state for check in checks) for state in ("ok", "warn", "fail")
    }
    say(f"{counts['ok']} ok, {counts['warn']} to know, {counts['fail']} to mend.")


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def _airflow(found: Settings) -> AirflowApi:
    """Return a client of the Airflow that the settings name. Raises BadInput if they name none."""
    from trainyard.platform.airflow_api import AirflowApi
    from trainyard.platform.control import address

    if found.airflow_url:
        return AirflowApi(
            found.airflow_url,
            found.airflow_user,
            found.airflow_password.get_secret_value(),
            token=found.airflow_token.get_secret_value(),
        )
    here = address(found)
    if here is None:
        raise BadInput(
            "No Airflow is named, and the embedded platform does not run.",
            hint="Set TRAINYARD_AIRFLOW_URL, start it with `trainyard up`, or give --no-airflow.",
        )
    return AirflowApi(here.airflow_url, here.username, here.password, embedded=True)
