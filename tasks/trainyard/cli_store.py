"""`trainyard store …`: look at the store, check it, and free space in it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from trainyard.console import err, fail, say, settings, show
from trainyard.errors import BadInput, NotFound, TrainyardError, Transient

if TYPE_CHECKING:
    from trainyard.care.decide import Decision
    from trainyard.documents.release import Release
    from trainyard.settings import Settings
    from trainyard.store.objects import StoredObject
    from trainyard.store.protocol import Store

store_app = typer.Typer(
    help="Look at the store, check every byte of it, and free space in it.",
    no_args_is_help=True,
)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def _open() -> tuple[Settings, Store]:
    from trainyard.store.factory import open_store

    found = settings()
    try:
        return found, open_store(found)
    except TrainyardError as error:
        fail(error)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


@store_app.command()
def ls(
    what: Annotated[
        str,
        typer.Argument(
            help="A kind (such as release, checkpoint, bundle) or the beginning of a key. "
            "Empty: everything but locks and the documents of single steps.",
        ),
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """List what is stored, with size, age, and who refers to it."""
    from trainyard.care.inventory import Reader
    from trainyard.care.usage import referrers

    _, store = _open()
    now = datetime.now(UTC)
    try:
        facts = Reader(store).facts(now)
    except TrainyardError as error:
        fail(error)
    named_by = referrers(facts)
    chosen = [each for each in facts.objects.values() if _is_wanted(each, what)]
    if what and not chosen:
        fail(
            NotFound(
                f"Nothing in {store.url} is of kind {what!r} or begins with {what!r}.",
                hint="`trainyard store du` shows which kinds there are.",
            )
        )
    if as_json:
        _print_json(
            [_as_json(each) | {"named_by": named_by.get(each.prefix, ())} for each in chosen]
        )
        return
    table = Table("Kind", "Name", "Size", "Files", "Age", "Named by")
    for each in chosen:
        named = named_by.get(each.prefix, ())
        kind = each.kind if each.complete else f"{each.kind} (incomplete)"
        table.add_row(
            kind,
            each.prefix,
            decimal(each.size),
            str(len(each.entries)),
            _age(each, now),
            f"{named[0]} and {len(named) - 1} more" if len(named) > 1 else "".join(named),
        )
    show(table)


@store_app.command("show")
def show_(
    key: Annotated[
        str,
        typer.Argument(
            help="A key, the folder of a checkpoint or bundle, or a release id.",
            show_default=False,
        ),
    ],
    as_json: JsonOption = False,
) -> None:
    """Show one document; a release with where it serves, a manifest with its files."""
    from trainyard.care.lookup import find_key

    found, store = _open()
    try:
        place, data = find_key(store, key)
        if as_json:
            sys.stdout.write(data.decode())
        elif place.kind == "release":
            _show_release(store, found, place.prefix)
        else:
            _show_document(data)
    except UnicodeDecodeError:
        fail(BadInput(f"{key} is no text.", hint="Only documents can be shown."))
    except TrainyardError as error:
        fail(error)


@store_app.command()
def verify(
    prefixes: Annotated[
        list[str] | None,
        typer.Argument(
            help="Keys or beginnings of keys to check. Empty: the whole store.", show_default=False
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Read every byte again and name what is missing, wrong or too much; exit 10 if anything is."""
    from trainyard.care.gc import policy_of
    from trainyard.care.verify import Verifier

    found, store = _open()
    columns = (TextColumn("Verifying"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        bar = progress.add_task("")
        verifier = Verifier(
            store,
            found,
            policy_of(found),
            on_bytes=lambda size: progress.advance(bar, size),
            on_total=lambda size: progress.update(bar, total=size),
        )
        try:
            verified = verifier.run(prefixes or ())
        except TrainyardError as error:
            progress.stop()
            fail(error)
    if as_json:
        _print_json(
            {
                "whole": verified.is_whole,
                "files": verified.files,
                "bytes": verified.size,
                "problems": [vars(each) for each in verified.problems],
            }
        )
    else:
        for problem in verified.problems:
            say(f"{problem.kind}: {problem.key}: {problem.message}")
        wrong = sum(problem.is_wrong for problem in verified.problems)
        noun = "problem" if wrong == 1 else "problems"
        say(f"Read {verified.files} files, {decimal(verified.size)}: {wrong or 'no'} {noun}.")
    if not verified.is_whole:
        raise typer.Exit(BadInput.exit_code)


@store_app.command()
def du(as_json: JsonOption = False) -> None:
    """Show where the bytes are, by kind and model, and what `gc --delete` would free."""
    from trainyard.care.gc import Collection, policy_of
    from trainyard.care.inventory import Reader
    from trainyard.care.usage import usage

    found, store = _open()
    now = datetime.now(UTC)
    collection = Collection(
        store,
        policy_of(found),
        pause_s=0.0,
        lock_s=0.0,
        say=lambda line: err.print(line, markup=False, highlight=False),
        now=lambda: now,
    )
    try:
        facts = Reader(store).facts(now)
        used = usage(facts, collection.judge(facts))
    except TrainyardError as error:
        fail(error)
    if as_json:
        _print_json([vars(each) for each in used])
        return
    table = Table("Kind", "Model", "Objects", "Files", "Size", "gc frees", show_footer=True)
    for each in used:
        cells = (each.objects, each.files, decimal(each.size), decimal(each.freeable))
        table.add_row(each.kind, each.model, *map(str, cells))
    totals = (
        "",
        "",
        str(sum(each.objects for each in used)),
        str(sum(each.files for each in used)),
        decimal(sum(each.size for each in used)),
        decimal(sum(each.freeable for each in used)),
    )
    for column, total in zip(table.columns, totals, strict=True):
        column.footer = total
    show(table)


@store_app.command()
def gc(
    delete: Annotated[
        bool,
        typer.Option(
            "--delete",
            help="Really delete. Without it nothing is changed: it only says what would go, and "
            "why the rest stays.",
        ),
    ] = False,
    as_json: JsonOption = False,
    die_with_parent: Annotated[
        bool,
        typer.Option(
            "--die-with-parent",
            help="Stop when standard input closes. Airflow uses it; a terminal has no need of it.",
        ),
    ] = False,
) -> None:
    """Remove what no channel, recent release, active plan or running step needs.

    Without `--delete` it changes nothing.
    """
    from trainyard.care.gc import Collection, policy_of
    from trainyard.steps.stopping import StepStopped, Stopper

    found, store = _open()
    collection = Collection(
        store,
        policy_of(found),
        pause_s=found.gc_pause_s,
        lock_s=found.step_lock_s,
        say=(lambda line: None) if as_json else say,
    )
    try:
        if not delete:
            _report_dry_run(collection.look(), as_json)
            return
        with Stopper(die_with_parent=die_with_parent):
            done = collection.run()
    except TrainyardError as error:
        fail(error)
    except StepStopped as stopped:
        fail(Transient(str(stopped), hint="What is left is found by the next run."))
    if as_json:
        _print_json(
            {
                "deleted": [_as_json(each) for each in done.deleted],
                "spared": [_decision_as_json(each) for each in done.spared],
                "freed_bytes": done.freed_bytes,
            }
        )
        return
    for decision in done.spared:
        say(f"Spared {decision.object.prefix}. {decision.reason}")
    say(
        f"Deleted {len(done.deleted)} objects, {decimal(done.freed_bytes)}; "
        f"kept {len(done.decisions) - len(done.deleted)}."
    )


def _report_dry_run(decisions: Iterable[Decision], as_json: bool) -> None:
    decisions = sorted(decisions, key=lambda each: each.keep)
    if as_json:
        _print_json([_decision_as_json(each) for each in decisions])
        return
    for each in decisions:
        verb = "keep" if each.keep else "would delete"
        say(f"{verb} {each.object.prefix} ({decimal(each.object.size)}). {each.reason}")
    doomed = [each.object for each in decisions if not each.keep]
    freed = decimal(sum(each.size for each in doomed))
    say(f"{len(doomed)} of {len(decisions)} objects would go, {freed}. Nothing was changed.")
    if doomed:
        say("To delete them: trainyard store gc --delete")


def _is_wanted(stored: StoredObject, what: str) -> bool:
    if not what:
        return stored.kind not in {"lock", "status", "reports"}
    return stored.kind == what or stored.prefix.startswith(what.rstrip("/"))


def _as_json(stored: StoredObject) -> dict[str, Any]:
    modified_at = stored.modified_at
    return {
        "kind": stored.kind,
        "name": stored.prefix,
        "complete": stored.complete,
        "bytes": stored.size,
        "files": len(stored.entries),
        "modified_at": modified_at.isoformat() if modified_at else None,
    }


def _decision_as_json(decision: Decision) -> dict[str, Any]:
    return {**_as_json(decision.object), "keep": decision.keep, "reason": decision.reason}


def _age(stored: StoredObject, now: datetime) -> str:
    from trainyard.care.decide import age_text

    return age_text(now - stored.modified_at) if stored.modified_at else "unknown"


def _show_document(data: bytes) -> None:
    """Print a document as YAML, the files of a manifest as a table."""
    import yaml

    text = data.decode()
    try:
        value = json.loads(text)
    except ValueError:
        sys.stdout.write(text)
        return
    files = value.pop("files", None) if isinstance(value, dict) else None
    say(yaml.safe_dump(value, sort_keys=False, allow_unicode=True).rstrip())
    if isinstance(files, list):
        table = Table("File", "Size", "sha256")
        for entry in files:
            table.add_row(entry["path"], decimal(entry["size"]), entry["sha256"])
        show(table)


def _show_release(store: Store, found: Settings, key: str) -> None:
    """Print what a release is made of, where it serves, and what was found out about it."""
    from trainyard.care.lookup import roles_of
    from trainyard.releases import list_attestations, load_release

    _, model, name = key.split("/")
    release: Release = load_release(store, model, name.removesuffix(".json"), found)
    table = Table("Release", release.release_id)
    for label, value in (
        ("Revision", release.revision),
        ("Target", f"{release.target.name} ({release.lane})"),
        ("Checkpoint", release.checkpoint_key),
        ("Bundle", f"bundles/{release.compile_key}"),
        ("Measurement", f"measurements/{release.measurement_id}.json"),
        ("Served as", release.served_model_name),
        ("Published", f"{release.created_at:%Y-%m-%d %H:%M} UTC"),
        ("By", release.provenance.requested_by),
        ("Signature", "by a trusted key"),
        ("Serves", "\n".join(roles_of(store, key)) or "nowhere"),
    ):
        table.add_row(label, value)
    for attestation in list_attestations(store, model, release.release_id):
        said = ", ".join(
            f"{name} {value}"
            for name, value in attestation.subject.items()
            if value is not None and name != "warnings"
        )
        table.add_row(f"{attestation.kind.capitalize()}", said)
        for words in attestation.warnings:
            table.add_row("Warning", words)
    show(table)
