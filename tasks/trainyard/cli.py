"""The command line: the same entry point on a laptop, in a pod and in an Airflow task."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.markup import escape
from rich.table import Column, Table

from trainyard import __version__, cli_rollout
from trainyard.cli_doctor import doctor_app
from trainyard.cli_judge import judge
from trainyard.cli_presets import presets_app
from trainyard.cli_render import render_app
from trainyard.cli_store import store_app
from trainyard.cli_verify import verify_command
from trainyard.console import err, out
from trainyard.console import fail as _fail
from trainyard.console import say as _say
from trainyard.console import settings as _settings
from trainyard.console import show as _show
from trainyard.errors import BadInput, CorruptFile, NotFound, TrainyardError
from trainyard.freed_memory import keep_freed_memory
from trainyard.names import check_name
from trainyard.settings import Settings
from trainyard.steps.context import StepContext, StepResult

app = typer.Typer(
    name="trainyard",
    help="Release large language models on AWS Trainium and Inferentia: compile, measure, gate, "
    "publish, canary, roll back.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

node_cache = typer.Typer(
    help="Look after the files of releases that everything on this machine shares.",
    no_args_is_help=True,
)
STEPS = "Steps of a release"
LOOK = "Look at things"
BY_HAND = "Take a rollout in hand, without Airflow"
ASK = "Ask an Airflow"
SERVE = "Serve releases"
PLATFORM = "The platform on this machine"

app.add_typer(node_cache, name="node-cache", rich_help_panel=SERVE)
app.add_typer(store_app, name="store", rich_help_panel=LOOK)
app.add_typer(render_app, name="render", rich_help_panel=LOOK)
app.add_typer(presets_app, name="presets", rich_help_panel=LOOK)
app.add_typer(doctor_app, name="doctor", rich_help_panel=LOOK)

PlanOption = Annotated[str, typer.Option("--plan", help="Id of the plan.", show_default=False)]
TargetOption = Annotated[
    str, typer.Option("--target", help="Name of the target.", show_default=False)
]
DieWithParentOption = Annotated[
    bool,
    typer.Option(
        "--die-with-parent",
        help="Stop when standard input closes. Airflow uses it; a terminal has no need of it.",
    ),
]
AcceptUnprovenOption = Annotated[
    bool,
    typer.Option(
        "--accept-unproven",
        help="Go on although nobody has proven image, instance and lane of a target.",
    ),
]
ModelArgument = Annotated[str, typer.Argument(help="Name of the model.", show_default=False)]
EnvironmentArgument = Annotated[
    str, typer.Argument(help="Name of the environment.", show_default=False)
]


def _version(wanted: bool) -> None:
    if wanted:
        _say(f"trainyard {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Hold the options of all commands."""


# --- Steps ------------------------------------------------------------------------------------


def _run(
    name: str,
    plan_id: str,
    target: str,
    die_with_parent: bool,
    body: Callable[[StepContext], StepResult],
    *,
    force: bool = False,
) -> NoReturn:
    """Run a step under its lock and status document, and exit with its code."""
    from trainyard.steps.runner import run_step
    from trainyard.store.factory import open_store

    settings = _settings()
    try:
        store = open_store(settings)
    except TrainyardError as error:
        _fail(error)
    code = run_step(
        name,
        plan_id=plan_id,
        target=target,
        body=body,
        settings=settings,
        store=store,
        force=force,
        die_with_parent=die_with_parent,
    )
    raise typer.Exit(code)


def _plan_of(plan_id: str, context: StepContext) -> Any:
    from trainyard.documents.plan import Plan
    from trainyard.store.documents import read_document
    from trainyard.store.layout import plan_key

    return read_document(context.store, plan_key(plan_id), Plan)


@app.command(rich_help_panel=STEPS)
def plan(
    request: Annotated[
        str,
        typer.Option(
            help='The request as JSON: {"model": …, "revision": …, "targets": […], '
            '"environments": […], "overrides": {…}}.',
            show_default=False,
        ),
    ] = "",
    model: Annotated[str, typer.Option(help="Name of the model, instead of --request.")] = "",
    revision: Annotated[str, typer.Option(help="Revision of the source; with --model.")] = "",
    environment: Annotated[
        list[str] | None,
        typer.Option(help="Environment to promote to; may be repeated; with --model."),
    ] = None,
    accept_unproven: AcceptUnprovenOption = False,
    plan_id: Annotated[
        str, typer.Option("--plan", help="Id of the plan; empty: made from its content.")
    ] = "",
    die_with_parent: DieWithParentOption = False,
) -> None:
    """Say what a release would do, and refuse bad input before any work starts."""
    from pydantic import ValidationError

    from trainyard.documents.plan import ReleaseRequest
    from trainyard.steps.plan import plan as make_plan

    if bool(request) == bool(model):
        _fail(BadInput("Give either --request or --model."))
    if request and (revision or environment or accept_unproven):
        _fail(
            BadInput(
                "--revision, --environment and --accept-unproven go with --model only.",
                hint='Put "revision", "environments" and "accept_unproven" into the request.',
            )
        )
    try:
        wanted = (
            ReleaseRequest.model_validate_json(request)
            if request
            else ReleaseRequest(
                model=model,
                revision=revision or None,
                environments=tuple(environment or ()),
                accept_unproven=accept_unproven,
            )
        )
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'request'}: {e['msg']}" for e in error.errors()
        )
        _fail(BadInput(f"The request is not valid: {problems}."))
    try:
        check_name(wanted.model, "Model")
    except BadInput as error:
        _fail(error)
    _run(
        "plan",
        plan_id or f"{wanted.model}-draft",
        "",
        die_with_parent,
        lambda context: make_plan(wanted, context, plan_id=plan_id or None),
    )


@app.command(rich_help_panel=STEPS)
def download(
    plan_id: PlanOption,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Read what is stored again, and bring damaged files back from the source.",
        ),
    ] = False,
    die_with_parent: DieWithParentOption = False,
) -> None:
    """Store the checkpoint of a plan, every file hashed on the way."""
    from trainyard.steps.download import download as step

    keep_freed_memory()
    _run(
        "download",
        plan_id,
        "",
        die_with_parent,
        lambda c: step(_plan_of(plan_id, c), c),
        force=force,
    )


@app.command(rich_help_panel=STEPS)
def tasks(
    plan_id: PlanOption, target: TargetOption, die_with_parent: DieWithParentOption = False
) -> None:
    """Ask this image's lm-evaluation-harness about its own tasks, before a device is taken."""
    from trainyard.steps.tasks import check_tasks as step

    _run("tasks", plan_id, target, die_with_parent, lambda c: step(_plan_of(plan_id, c), target, c))


@app.command("compile", rich_help_panel=STEPS)
def compile_(
    plan_id: PlanOption, target: TargetOption, die_with_parent: DieWithParentOption = False
) -> None:
    """Compile for a target, or find the bundle with the same compile key."""
    from trainyard.steps.compile import compile_bundle as step

    _run(
        "compile", plan_id, target, die_with_parent, lambda c: step(_plan_of(plan_id, c), target, c)
    )


@app.command(rich_help_panel=STEPS)
def measure(
    plan_id: PlanOption, target: TargetOption, die_with_parent: DieWithParentOption = False
) -> None:
    """Start the server from its bundle, prove that it did, and measure accuracy and latency."""
    from trainyard.steps.measure import measure as step

    _run(
        "measure", plan_id, target, die_with_parent, lambda c: step(_plan_of(plan_id, c), target, c)
    )


@app.command(rich_help_panel=STEPS)
def logits(
    plan_id: PlanOption, target: TargetOption, die_with_parent: DieWithParentOption = False
) -> None:
    """Run AWS's logit validation, where the spec asks for it; it is not the served graph."""
    from trainyard.steps.logits import validate_logits as step

    _run(
        "logits", plan_id, target, die_with_parent, lambda c: step(_plan_of(plan_id, c), target, c)
    )


@app.command(rich_help_panel=STEPS)
def gate(
    plan_id: PlanOption,
    target: TargetOption,
    gate: Annotated[
        Literal["accuracy", "latency"], typer.Option(help="Which gate.", show_default=False)
    ],
    die_with_parent: DieWithParentOption = False,
) -> None:
    """Turn the figures of a measurement into a verdict."""
    from trainyard.steps.gate import gate as step

    _run(
        f"{gate}-gate",
        plan_id,
        target,
        die_with_parent,
        lambda c: step(_plan_of(plan_id, c), target, gate, c),
    )


@app.command(rich_help_panel=STEPS)
def publish(
    plan_id: PlanOption,
    target: TargetOption,
    to: Annotated[
        str, typer.Option(help="Also push it to a registry: oci://HOST/REPOSITORY.")
    ] = "",
    die_with_parent: DieWithParentOption = False,
) -> None:
    """Derive the verdicts again, then sign and store the release."""
    from trainyard.export import Registry
    from trainyard.steps.publish import publish as step

    try:
        registry = Registry.parse(to) if to else None
    except TrainyardError as error:
        _fail(error)

    def body(context: StepContext) -> StepResult:
        made = _plan_of(plan_id, context)
        result = step(made, target, context)
        if registry is not None:
            _export(made.spec.model, str(result.detail["release_id"]), registry, context)
        return result

    _run("publish", plan_id, target, die_with_parent, body)


def _export(model: str, release_id: str, registry: Any, context: StepContext) -> None:
    from trainyard.export import export_release
    from trainyard.releases import load_release

    release = load_release(context.store, model, release_id, context.settings)
    done = export_release(
        context.store, release, registry, context.settings, say=context.progress.say
    )
    context.progress.say(f"{done.reference} is {done.digest}.")


@app.command("import-bundle", rich_help_panel=STEPS)
def import_bundle(
    folder: Annotated[
        Path,
        typer.Argument(
            help="The server's cache root, or a compiled model's folder.", show_default=False
        ),
    ],
    model: Annotated[str, typer.Option(help="Name of the model.", show_default=False)],
    target: TargetOption,
    revision: Annotated[str, typer.Option(help="Revision of the source.")] = "",
    die_with_parent: DieWithParentOption = False,
) -> None:
    """Store what was compiled before as the bundle of a target, checked as a compile is."""
    from trainyard.steps.import_bundle import import_bundle as step

    try:
        check_name(model, "Model")
        check_name(target, "Target")
    except BadInput as error:
        _fail(error)
    _run(
        "import-bundle",
        f"{model}-import",
        target,
        die_with_parent,
        lambda c: step(folder, model=model, target=target, revision=revision or None, context=c),
    )


@app.command("import-reference", rich_help_panel=STEPS)
def import_reference(
    plan_id: PlanOption,
    target: TargetOption,
    file: Annotated[
        Path | None, typer.Argument(help="A reference that was made elsewhere; else made here.")
    ] = None,
    die_with_parent: DieWithParentOption = False,
) -> None:
    """Store what the parity check of a target compares with, apart from the measurement."""
    from trainyard.steps.reference import import_reference as step

    _run(
        "import-reference",
        plan_id,
        target,
        die_with_parent,
        lambda c: step(_plan_of(plan_id, c), target, c, file=file),
    )


# --- Look -------------------------------------------------------------------------------------


@app.command(rich_help_panel=LOOK)
def check(
    files: Annotated[
        list[Path], typer.Argument(help="Model specs and environment files.", show_default=False)
    ],
) -> None:
    """Check model specs and environment files; name every problem with its line and remedy."""
    from trainyard.steps.plan import check_files_with_lanes, warnings_of_files

    problems = check_files_with_lanes(files)
    for problem in problems:
        key = f" [cyan]{escape(problem.key)}[/]" if problem.key else ""
        place = f"[bold]{escape(str(problem.file))}:{problem.line}[/]{key}"
        err.print(f"{place}: {escape(problem.message)}", highlight=False, soft_wrap=True)
        if problem.remedy:
            err.print(f"    {escape(problem.remedy)}", highlight=False, soft_wrap=True)
    if problems:
        noun = "problem" if len(problems) == 1 else "problems"
        err.print(f"[bold red]{len(problems)} {noun}.[/]")
        raise typer.Exit(BadInput.exit_code)
    for warning in warnings_of_files(files):
        err.print(f"[yellow]Warning:[/] {escape(warning)}", highlight=False, soft_wrap=True)
    _say(f"{len(files)} file{'s' if len(files) != 1 else ''}: no problems.")


@app.command(rich_help_panel=LOOK)
def schema(
    what: Annotated[
        Literal["model", "environments"], typer.Argument(help="Which JSON Schema.")
    ] = "model",
) -> None:
    """Print the JSON Schema of model specs or of the environments file."""
    from trainyard.spec.schema import json_schema

    sys.stdout.write(json.dumps(json_schema(what), indent=2) + "\n")


@app.command(rich_help_panel=LOOK)
def pools() -> None:
    """Print the pools that Airflow needs, for `airflow pools import`."""
    from trainyard.platform.pools import pools_of
    from trainyard.spec.loader import load_environments

    try:
        found = pools_of(load_environments(_settings().environments).steps)
    except TrainyardError as error:
        _fail(error)
    # Deferred tasks count: their work goes on in a pod.
    values = {
        pool.name: {"slots": pool.slots, "description": pool.description, "include_deferred": True}
        for pool in found
    }
    sys.stdout.write(json.dumps(values, indent=2) + "\n")


@app.command(rich_help_panel=LOOK)
def toolchain(
    lane: Annotated[
        Literal["cpu", "neuron-native", "neuron-nxdi"], typer.Option(help="Lane that it is for.")
    ],
    image: Annotated[
        str,
        typer.Option(
            help="The image that this runs in, as the environments file or the target names it. "
            "Empty: TRAINYARD_IMAGE.",
            show_default=False,
        ),
    ] = "",
) -> None:
    """Record the toolchain of the image that this runs in, for plans of pods that use it."""
    from trainyard.steps.toolchains import record_toolchain
    from trainyard.store.factory import open_store

    settings = _settings()
    try:
        record = record_toolchain(
            settings, open_store(settings), lane=lane, image=image or settings.image
        )
    except TrainyardError as error:
        _fail(error)
    for name, version in sorted(record.toolchain.items()):
        _say(f"{name} {version}")
    _say(f"Recorded for image {record.image} and lane {record.lane}.")


@app.command(rich_help_panel=LOOK)
def releases(model: ModelArgument) -> None:
    """List the published releases of a model."""
    from trainyard.releases import list_releases, load_release
    from trainyard.reports.provenance import signed_by
    from trainyard.signing.keys import trusted_keys
    from trainyard.spec.loader import Catalogue
    from trainyard.store.factory import open_store

    settings = _settings()
    # The id is what other commands are given: in a narrow terminal everything else folds first.
    release_column = Column("Release", no_wrap=True)
    table = Table(release_column, "Revision", "Target", "Compile key", "Published", "Signed by")
    try:
        store = open_store(settings)
        found = list_releases(store, model)
        if not found:
            Catalogue(settings.catalogue).path(model)
        trusted = trusted_keys(settings)
    except TrainyardError as error:
        _fail(error)
    for release in found:
        table.add_row(
            release.release_id,
            release.revision,
            release.target.name,
            release.compile_key[:12],
            f"{release.created_at:%Y-%m-%d %H:%M} UTC",
            signed_by(
                partial(load_release, store, model, release.release_id, settings, trusted=trusted)
            ),
        )
    _show(table)


def _load_release(store: Any, model: str, text: str) -> Any:
    from trainyard.releases import load_release, resolve_release

    return load_release(store, model, resolve_release(store, model, text), _settings())


@app.command(rich_help_panel=LOOK)
def provenance(
    model: ModelArgument,
    release: Annotated[
        str, typer.Argument(help="Release id, the beginning of its digits, or `latest`.")
    ] = "latest",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the in-toto statement that is signed.")
    ] = False,
) -> None:
    """Show who signed a release, from what it was made, and whether all of that is still there."""
    from trainyard.documents.statement import payload_of_release
    from trainyard.releases import pins_not_held
    from trainyard.reports.provenance import provenance_table
    from trainyard.store.factory import open_store

    try:
        store = open_store(_settings())
        found = _load_release(store, model, release)
        lost = pins_not_held(store, found.pins)
    except TrainyardError as error:
        _fail(error)
    if as_json:
        statement = json.loads(payload_of_release(found))
        sys.stdout.write(json.dumps(statement, indent=2, ensure_ascii=False) + "\n")
    else:
        _show(provenance_table(found, lost))
    if lost:
        _fail(
            CorruptFile(
                f"{', '.join(lost)} is gone, or is not the document that was signed.",
                hint="Bring it back from a backup, or publish the release again from its plan.",
            )
        )


@app.command(rich_help_panel=LOOK)
def report(
    release: Annotated[str, typer.Argument(help="Release id, or a model for its latest one.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="File to write. Default: RELEASE.html in this folder."),
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open it in a browser.")] = False,
) -> None:
    """Write the report of a release: one HTML page with verdicts, figures and plots."""
    import webbrowser

    from trainyard.release_report import find_release, read_release_report
    from trainyard.reports.release import release_report_html
    from trainyard.store.factory import open_store

    settings = _settings()
    try:
        store = open_store(settings)
        model, release_id = find_release(store, release)
        page = release_report_html(read_release_report(store, model, release_id, settings))
        path = out or Path(f"{release_id}.html")
        try:
            path.write_text(page, encoding="utf-8")
        except OSError as error:
            raise BadInput(
                f"{path} cannot be written: {error.strerror}.", hint="Name another file with --out."
            ) from error
    except TrainyardError as error:
        _fail(error)
    _say(str(path))
    if show:
        webbrowser.open(path.absolute().as_uri())


@app.command(rich_help_panel=LOOK)
def export(
    model: ModelArgument,
    release: Annotated[str, typer.Argument(help="Release id, its digits, or `latest`.")],
    to: Annotated[str, typer.Argument(help="Where to: oci://HOST/REPOSITORY.")],
) -> None:
    """Push a signed release and its bundle to an OCI registry such as ECR."""
    from trainyard.export import Registry, export_release
    from trainyard.store.factory import open_store

    settings = _settings()
    try:
        registry = Registry.parse(to)
        store = open_store(settings)
        found = _load_release(store, model, release)
        done = export_release(store, found, registry, settings, say=_say)
    except TrainyardError as error:
        _fail(error)
    _say(f"{done.reference} {'was there already' if done.reused else 'pushed'}: {done.digest}")


class _ShowByDefault(typer.core.TyperGroup):
    """`trainyard channel MODEL ENVIRONMENT` is `trainyard channel show MODEL ENVIRONMENT`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that `args` name."""
        if args and args[0] not in self.commands:
            args = ["show", *args]
        return super().resolve_command(ctx, args)


channel_app = typer.Typer(
    cls=_ShowByDefault,
    help="Show a channel, or make its route in a cluster.",
    no_args_is_help=True,
)
app.add_typer(channel_app, name="channel", rich_help_panel=SERVE)


@channel_app.command("show")
def channel(
    model: ModelArgument,
    environment: EnvironmentArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole document.")] = False,
) -> None:
    """Show what an environment serves, and the last events of its rollouts."""
    from trainyard.reports.channel import channel_table
    from trainyard.rollout.channel_store import read_channel
    from trainyard.store.factory import open_store

    settings = _settings()
    try:
        document = read_channel(open_store(settings), model, environment)
        if document.generation == 0:
            _require_known(settings, model, environment)
    except TrainyardError as error:
        _fail(error)
    if as_json:
        sys.stdout.write(document.to_bytes().decode())
    else:
        _show(channel_table(document))


@channel_app.command("init")
def channel_init(
    model: ModelArgument,
    environment: EnvironmentArgument,
    path: Annotated[
        str,
        typer.Option(
            help="Prefix of clients' paths, such as /v1 for a host of its own.",
            show_default="/ENVIRONMENT/MODEL/v1",
        ),
    ] = "",
    timeouts: Annotated[
        bool, typer.Option(help="Say in the route that answers may take any time.")
    ] = True,
    exception_added: Annotated[
        bool,
        typer.Option(
            "--exception-added",
            help="A GitOps tool made the route, and has been told to leave its weights alone.",
        ),
    ] = False,
) -> None:
    """Make the HTTPRoute of a model in an environment, once. Changes no weight."""
    from trainyard.serving.kubernetes.channel_init import init_channel
    from trainyard.serving.kubernetes.places import ServingPlaces

    settings = _settings()
    try:
        _require_known(settings, model, environment)
        places = ServingPlaces.load(settings, [environment])
        done = init_channel(
            places.connect(settings),
            model,
            environment,
            places.by_name[environment],
            path=path,
            timeouts=timeouts,
            exception_added=exception_added,
        )
    except TrainyardError as error:
        _fail(error)
    for warning in done.warnings:
        _say(f"Warning: {warning}")
    _say(done.did)


def _require_known(settings: Settings, model: str, environment: str) -> None:
    """Raise NotFound unless catalogue and environments file know both."""
    from trainyard.spec.loader import Catalogue, load_environments

    Catalogue(settings.catalogue).path(model)
    known = load_environments(settings.environments).environments
    if environment not in known:
        raise NotFound(
            f"There is no environment {environment!r} in {settings.environments}.",
            hint=f"Known are: {', '.join(known)}.",
        )


app.command(rich_help_panel=LOOK)(cli_rollout.status)
app.command(rich_help_panel=LOOK)(judge)

for _command in (
    cli_rollout.rollback,
    cli_rollout.abort,
    cli_rollout.pause,
    cli_rollout.resume,
    cli_rollout.promote_now,
    cli_rollout.watch,
):
    app.command(rich_help_panel=BY_HAND)(_command)


# --- Ask an Airflow ---------------------------------------------------------------------------

request_app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")
app.add_typer(
    request_app,
    name="request",
    rich_help_panel=ASK,
    help="Ask an Airflow for a release, a promotion or a rollback, once (for CI systems). "
    "TRAINYARD_AIRFLOW_URL names it; TRAINYARD_AIRFLOW_TOKEN, or TRAINYARD_AIRFLOW_USER and "
    "TRAINYARD_AIRFLOW_PASSWORD, log in. Without them it is the embedded platform.",
)

KeyOption = Annotated[
    str,
    typer.Option(
        "--key",
        help="Something of this request alone, such as the id of a CI job: the same key is the "
        "same request for ever.",
        show_default=False,
    ),
]
WaitOption = Annotated[
    bool, typer.Option("--wait", help="Say what happens, and exit as the run ended.")
]
TimeoutOption = Annotated[
    float, typer.Option("--timeout", min=1, help="Seconds that --wait waits at most.")
]
WaitForWindowOption = Annotated[
    bool,
    typer.Option(
        "--wait-for-window",
        help="Wait while an environment is frozen or in its quiet hours, instead of being refused.",
    ),
]
ReasonOption = Annotated[
    str, typer.Option("--reason", help="Why; kept in the channel's history.", show_default=False)
]


@request_app.command("release")
def request_release(
    model: ModelArgument,
    revision: Annotated[
        str, typer.Option(help="Revision of the source; empty: the spec's.", show_default=False)
    ] = "",
    target: Annotated[
        list[str] | None, typer.Option(help="Target of the spec; may be repeated.")
    ] = None,
    environment: Annotated[
        list[str] | None, typer.Option(help="Environment to promote to; may be repeated.")
    ] = None,
    overrides: Annotated[
        str,
        typer.Option(help="Settings that this release changes, as JSON.", show_default=False),
    ] = "",
    accept_unproven: AcceptUnprovenOption = False,
    wait_for_window: WaitForWindowOption = False,
    key: KeyOption = "",
    wait: WaitOption = False,
    timeout: TimeoutOption = 86400.0,
) -> None:
    """Ask for a release of a model."""
    from trainyard.platform.request import parse_overrides
    from trainyard.platform.request import release_request as make

    _request(
        lambda: make(
            model,
            revision=revision,
            targets=tuple(target or ()),
            environments=tuple(environment or ()),
            overrides=parse_overrides(overrides),
            accept_unproven=accept_unproven,
            wait_for_window=wait_for_window,
            key=key,
        ),
        timeout if wait else None,
    )


@request_app.command("promote")
def request_promote(
    model: ModelArgument,
    release: Annotated[str, typer.Argument(help="Id of the release.", show_default=False)],
    environment: EnvironmentArgument,
    force: Annotated[
        bool, typer.Option("--force", help="Even if it was rejected before; needs a reason.")
    ] = False,
    reason: ReasonOption = "",
    wait_for_window: WaitForWindowOption = False,
    key: KeyOption = "",
    wait: WaitOption = False,
    timeout: TimeoutOption = 86400.0,
) -> None:
    """Ask for the promotion of a release."""
    from trainyard.platform.request import promote_request as make

    _request(
        lambda: make(
            model,
            release,
            environment,
            force=force,
            reason=reason,
            wait_for_window=wait_for_window,
            key=key,
        ),
        timeout if wait else None,
    )


@request_app.command("rollback")
def request_rollback(
    model: ModelArgument,
    environment: EnvironmentArgument,
    to: Annotated[
        str,
        typer.Option("--to", help="Release to go back to; empty: the one before (needs --key)."),
    ] = "",
    reason: ReasonOption = "",
    key: KeyOption = "",
    wait: WaitOption = False,
    timeout: TimeoutOption = 86400.0,
) -> None:
    """Ask for a rollback."""
    from trainyard.platform.request import rollback_request as make

    _request(
        lambda: make(model, environment, release_id=to, reason=reason, key=key),
        timeout if wait else None,
    )


def _request(make: Callable[[], Any], timeout_s: float | None) -> None:
    """Ask for what `make` describes; with a time, wait for its end."""
    from trainyard.platform.request import ask, run_url, wait

    settings = _settings()
    try:
        wanted = make()
        api, url = _airflow(settings)
        asked = ask(api, wanted)
        word = "Started" if asked.started else "Found"
        _say(f"{word} {asked.run_id} ({asked.state})")
        _say(run_url(url, wanted.dag_id, asked.run_id))
        if timeout_s is None:
            return
        results = wait(api, wanted.dag_id, asked.run_id, _say, timeout_s=timeout_s)
    except TrainyardError as error:
        _fail(error)
    _say("Ended with success.")
    for task, value in results.items():
        _say(f"{task}: {value if isinstance(value, str) else json.dumps(value)}")


@app.command(rich_help_panel=ASK)
def refresh(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Names of models; none: all that are refreshed.", show_default=False),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only say what would be done and why. Needs no Airflow."),
    ] = False,
    again: Annotated[
        bool,
        typer.Option("--again", help="Ask for another run, whatever became of the ones before."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look for new revisions of models, and ask for one release of each."""
    from trainyard.cli_refresh import run_refresh

    settings = _settings()
    connect = None if dry_run else lambda: _airflow(settings)[0]
    run_refresh(settings, models or (), again=again, as_json=as_json, connect=connect)


def _airflow(settings: Settings) -> tuple[Any, str]:
    """Return a client of the Airflow that the settings name, and its address."""
    from trainyard.platform.airflow_api import AirflowApi

    url = settings.airflow_url
    if url:
        token = settings.airflow_token.get_secret_value()
        if not token and not settings.airflow_user:
            raise BadInput(
                f"Nobody is to log in at {url}.",
                hint="Set TRAINYARD_AIRFLOW_TOKEN, or TRAINYARD_AIRFLOW_USER and "
                "TRAINYARD_AIRFLOW_PASSWORD.",
            )
        password = settings.airflow_password.get_secret_value()
        return AirflowApi(url, settings.airflow_user, password, token=token), url
    from trainyard.platform.control import address

    found = address(settings)
    if found is None:
        raise BadInput(
            "No Airflow is named, and the embedded platform does not run.",
            hint="Set TRAINYARD_AIRFLOW_URL, or start it with `trainyard up`.",
        )
    api = AirflowApi(found.airflow_url, found.username, found.password, embedded=True)
    return api, found.airflow_url


@app.command(rich_help_panel=LOOK)
def explain(
    left: Annotated[
        str,
        typer.Argument(
            help="Compile key (or its first digits), release id, or plan id; PLAN/TARGET if the "
            "plan has several targets.",
            show_default=False,
        ),
    ],
    right: Annotated[str, typer.Argument(help="Another one.", show_default=False)],
) -> None:
    """Say which fields make two compile keys, releases or plans differ, and what follows."""
    from trainyard.explain import explain as compare
    from trainyard.explain import find_identity
    from trainyard.reports.difference import difference_table
    from trainyard.store.factory import open_store

    try:
        store = open_store(_settings())
        ours, theirs = find_identity(store, left), find_identity(store, right)
    except TrainyardError as error:
        _fail(error)
    found = compare(ours, theirs)
    rows = [
        *(("code", each) for each in found.code),
        *(("serving", each) for each in found.serving),
        *(("weights", each) for each in found.checkpoint),
    ]
    if rows:
        _show(difference_table(ours.name, theirs.name, rows))
    _say(found.consequence)


# --- Keys -------------------------------------------------------------------------------------

keys = typer.Typer(
    help="The keys that sign releases and those that are trusted.", no_args_is_help=True
)
app.add_typer(keys, name="keys", rich_help_panel=LOOK)

KeyArgument = Annotated[
    str, typer.Argument(help="Key id, or the beginning of it.", show_default=False)
]
DateOption = Annotated[datetime | None, typer.Option(help="UTC.", show_default=False)]


@keys.command("list")
def keys_list() -> None:
    """List the trusted and the revoked keys."""
    from trainyard.signing.keys import trusted_keys

    table = Table("Key", "Kind", "Whose", "State", "From", "Until")
    try:
        found = trusted_keys(_settings())
    except TrainyardError as error:
        _fail(error)
    if not found.keys:
        _say("There is none yet. The first release that is published here makes one.")
        return
    for key in found.keys:
        begin, end = key.not_before or key.added_at, key.revoked_at or key.not_after
        state = f"{key.state}: {key.reason}" if key.reason else key.state
        table.add_row(
            key.short_id,
            key.scheme,
            key.comment or key.kms_key,
            state,
            f"{begin:%Y-%m-%d}",
            f"{end:%Y-%m-%d}" if end else "",
        )
    _show(table)


@keys.command("add")
def keys_add(
    file: Annotated[
        Path | None, typer.Argument(help="Public key, PEM.", show_default=False)
    ] = None,
    kms: Annotated[str, typer.Option(help="Key in AWS KMS to fetch the public key of.")] = "",
    comment: Annotated[str, typer.Option(help="Whose key it is.")] = "",
    not_before: DateOption = None,
    not_after: DateOption = None,
) -> None:
    """Trust what a key signs."""
    from trainyard.signing.keys import add_key, add_kms_key
    from trainyard.signing.trust import public_key_of

    settings = _settings()
    try:
        if (file is None) == (not kms):
            raise BadInput("Give either the file of a public key or --kms.")
        if file is None:
            key = add_kms_key(
                settings,
                kms,
                comment=comment,
                not_before=_utc(not_before),
                not_after=_utc(not_after),
            )
        else:
            key = add_key(
                settings,
                public_key_of(_read_text(file), str(file)),
                comment=comment,
                default_comment=file.stem,
                not_before=_utc(not_before),
                not_after=_utc(not_after),
            )
    except TrainyardError as error:
        _fail(error)
    _say(f"Trusted: {key.key_id} ({key.scheme}).")


def _utc(moment: datetime | None) -> datetime | None:
    return moment and moment.replace(tzinfo=UTC)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}.") from error


@keys.command("revoke")
def keys_revoke(
    key: KeyArgument,
    reason: Annotated[str, typer.Option(help="Why; it is shown where the key is met.")],
) -> None:
    """Refuse whatever a key ever signed: for a key that somebody else may have."""
    from trainyard.signing.keys import revoke

    try:
        revoked = revoke(_settings(), key, reason)
    except TrainyardError as error:
        _fail(error)
    _say(f"Revoked: {revoked.key_id}. Publish again what it signed; see docs/releases.md.")


@keys.command("retire")
def keys_retire(key: KeyArgument) -> None:
    """Refuse what a key signs from now on; what it signed so far stays valid."""
    from trainyard.signing.keys import retire

    try:
        retired = retire(_settings(), key)
    except TrainyardError as error:
        _fail(error)
    _say(f"Retired: {retired.key_id}.")


@keys.command("new")
def keys_new() -> None:
    """Replace the local signing key by a new one; what the old one signed stays valid."""
    from trainyard.signing.keys import new_local_key

    try:
        new, old = new_local_key(_settings())
    except TrainyardError as error:
        _fail(error)
    if old is not None:
        _say(f"Retired: {old.key_id}.")
    _say(f"Signs from now on: {new.key_id}.")
    sys.stdout.write(new.public_key)


# --- Platform ---------------------------------------------------------------------------------


def _print_address(settings: Settings) -> None:
    from trainyard.platform.control import address
    from trainyard.platform.paths import PlatformPaths

    found = address(settings)
    if found is None:
        _say("The platform does not run. `trainyard up` starts it.")
        return
    _say(f"Airflow  {found.airflow_url}  (user {found.username}, password {found.password})")
    _say(f"Serving  {found.proxy_url}/<environment>/<model>/v1")
    if settings.airflow_database == "postgresql":
        socket = PlatformPaths(settings.home.resolve()).postgres / "socket"
        _say(f"Database  {socket}  (socket of PostgreSQL; user and database airflow)")


@app.command(rich_help_panel=PLATFORM)
def up() -> None:
    """Start PostgreSQL, Airflow, the agent and the proxy, and wait until all are healthy."""
    from trainyard.platform.control import up as start

    settings = _settings()
    try:
        start(settings, _say)
    except TrainyardError as error:
        _fail(error)
    _print_address(settings)


@app.command(rich_help_panel=PLATFORM)
def down(
    with_database: Annotated[
        bool,
        typer.Option(
            "--remove-database", help="Also remove Airflow's database; `make clean` does."
        ),
    ] = False,
) -> None:
    """Stop every process that `up` or `demo` started, servers of releases included."""
    from trainyard.platform.control import down as stop
    from trainyard.platform.control import remove_database

    settings = _settings()
    try:
        stop(settings, _say)
    except TrainyardError as error:
        _fail(error)
    if with_database:
        remove_database(settings)


@app.command(rich_help_panel=PLATFORM)
def where() -> None:
    """Print the addresses and the login of the running platform."""
    _print_address(_settings())


@app.command(rich_help_panel=PLATFORM)
def demo() -> None:
    """Take four releases of a small model through everything, with real traffic."""
    from trainyard.demo.run import run_demo

    try:
        code = run_demo(_settings(), out)
    except TrainyardError as error:
        _fail(error)
    raise typer.Exit(code)


@app.command(rich_help_panel=SERVE)
def materialize(
    release: Annotated[str, typer.Argument(help="Id of the release.", show_default=False)],
    folder: Annotated[
        Path, typer.Argument(help="Gets the folders `model` and `cache`.", show_default=False)
    ],
    pin: Annotated[
        str, typer.Option(help="Pin the release in the node cache, for an owner of this name.")
    ] = "",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print progress and result as lines of JSON.")
    ] = False,
    status: Annotated[
        Path | None,
        typer.Option(help="Keep progress and outcome in this file, as JSON.", show_default=False),
    ] = None,
) -> None:
    """Restore a release for a server, through the node cache; what a restore container runs."""
    from trainyard.restore import restore_release
    from trainyard.restore_report import RestoreReport
    from trainyard.store.factory import open_store

    keep_freed_memory()
    settings = _settings()
    try:
        with RestoreReport(out, release, as_json=as_json, status=status) as report:
            report.finished(
                restore_release(
                    open_store(settings),
                    release,
                    folder,
                    settings,
                    pin_owner=pin,
                    watcher=report,
                )
            )
    except TrainyardError as error:
        _fail(error)


@app.command(rich_help_panel=SERVE)
def adopt(
    model: ModelArgument,
    environment: EnvironmentArgument,
    deployment: Annotated[
        str, typer.Argument(help="Name of the running Deployment.", show_default=False)
    ],
    container: Annotated[
        str, typer.Option(help="Container that serves. Empty: the only one.")
    ] = "",
    port: Annotated[int, typer.Option(help="Where it listens. 0: as the Deployment says.")] = 0,
) -> None:
    """Make a Deployment that runs already the stable release, unverified; restarts nothing."""
    from datetime import UTC, datetime

    from trainyard.kubernetes.client import Cluster
    from trainyard.serving.kubernetes.adopt import adopt as adopt_
    from trainyard.serving.kubernetes.adopt import place_of
    from trainyard.spec.loader import Catalogue, load_environments
    from trainyard.store.factory import open_store

    settings = _settings()
    try:
        place = place_of(load_environments(settings.environments), environment)
        adoption, _ = adopt_(
            Cluster.connect(settings, place.context),
            open_store(settings),
            namespace=place.namespace,
            model=model,
            environment=environment,
            deployment=deployment,
            container=container,
            port=port,
            served_name=Catalogue(settings.catalogue).load(model).client_model_name,
            who=settings.requested_by,
            now=datetime.now(UTC),
        )
    except TrainyardError as error:
        _fail(error)
    _say(
        f"{deployment} is the stable release of {model} in {environment} now, unverified, as "
        f"{adoption.release_id}: {adoption.ready} ready, container {adoption.container}, port "
        f"{adoption.port}."
    )


@node_cache.command("ls")
def node_cache_ls() -> None:
    """Show which releases are in the node cache, and who pinned them."""
    from trainyard.node_cache.words import node_cache_table, node_cache_total
    from trainyard.restore import open_cache

    try:
        state = open_cache(_settings()).state()
    except TrainyardError as error:
        _fail(error)
    _show(node_cache_table(state))
    _say(node_cache_total(state))


@node_cache.command("pin")
def node_cache_pin(
    release: Annotated[str, typer.Argument(help="Id of a release that is in the cache.")],
    owner: Annotated[str, typer.Option(help="Who needs it.", show_default=False)],
    folder: Annotated[
        Path | None, typer.Option(help="Ends the pin when this folder is gone.")
    ] = None,
) -> None:
    """Let a release stay in the node cache until its owner takes the pin back."""
    from datetime import UTC, datetime

    from trainyard.node_cache.records import Pin
    from trainyard.restore import open_cache

    pin = Pin(
        release_id=release,
        owner=owner,
        since=datetime.now(UTC),
        folder=folder.absolute() if folder else None,
    )
    try:
        open_cache(_settings()).pin(pin)
    except TrainyardError as error:
        _fail(error)
    _say(f"{release} stays until {owner} takes the pin back.")


@node_cache.command("unpin")
def node_cache_unpin(
    owner: Annotated[str, typer.Argument(help="Whose pins to take back.", show_default=False)],
    release: Annotated[str, typer.Option(help="Only the pin on this release.")] = "",
) -> None:
    """Take pins back."""
    from trainyard.restore import open_cache

    try:
        count = open_cache(_settings()).unpin(owner, release or None)
    except TrainyardError as error:
        _fail(error)
    _say(f"{count} pin{'s' if count != 1 else ''} of {owner} taken back.")


@node_cache.command("evict")
def node_cache_evict(
    to_gib: Annotated[
        float | None,
        typer.Option("--to-gib", min=0, help="What may stay; empty: the limit of the cache."),
    ] = None,
) -> None:
    """Remove what is least recently used, and neither pinned nor in use."""
    from trainyard.node_cache.words import eviction_sentence
    from trainyard.restore import evict_from_cache
    from trainyard.store.factory import open_store

    settings = _settings()
    try:
        eviction = evict_from_cache(open_store(settings), settings, to_gib)
    except TrainyardError as error:
        _fail(error)
    _say(eviction_sentence(eviction))


app.command("verify", rich_help_panel=LOOK)(verify_command(_airflow))


@app.command(rich_help_panel=LOOK)
def metrics(
    once: Annotated[
        bool,
        typer.Option("--once", help="Print the figures once, for a textfile collector."),
    ] = False,
) -> None:
    """Tell Prometheus about channels, rollouts, gates and steps: what the store says of them.

    Serves `/metrics` at `TRAINYARD_METRICS_PORT` until it is stopped.
    """
    from trainyard.metrics.page import page_now, run_exporter

    try:
        if once:
            sys.stdout.write(page_now(_settings()).decode())
        else:
            run_exporter(_settings())
    except TrainyardError as error:
        _fail(error)


@app.command(hidden=True)
def agent() -> None:
    """Keep the servers that are wished for running (the supervisor starts this)."""
    from trainyard.serving.agent import run_agent

    try:
        run_agent(_settings())
    except TrainyardError as error:
        _fail(error)


EnvironmentsArgument = Annotated[
    list[str] | None,
    typer.Argument(help="Environments of one namespace; by default all that are in a cluster."),
]


@app.command(hidden=True)
def proxy(
    environments: EnvironmentsArgument = None,
    follow_route: Annotated[
        bool,
        typer.Option("--follow-route", help="Follow HTTPRoutes; runs in the cluster."),
    ] = False,
) -> None:
    """Split traffic between releases (the supervisor, or a Deployment, starts this)."""
    from trainyard.serving.kubernetes.route_follower import run_follower
    from trainyard.serving.proxy import run_proxy

    try:
        if follow_route:
            run_follower(_settings(), environments or ())
        else:
            run_proxy(_settings())
    except TrainyardError as error:
        _fail(error)


@app.command(hidden=True)
def guard(environments: EnvironmentsArgument = None) -> None:
    """Keep the weights of HTTPRoutes in line with channels (a Deployment in the cluster)."""
    from trainyard.serving.kubernetes.guard import run_guard

    try:
        run_guard(_settings(), environments or ())
    except TrainyardError as error:
        _fail(error)
