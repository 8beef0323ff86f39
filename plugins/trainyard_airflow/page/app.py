"""The page's application: every route reads, none writes, all are behind Airflow's login.

What changes anything is asked of Airflow's public API by the browser, as the signed-in user.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Annotated, Any, TypeVar
from urllib.parse import quote

from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import HTMLResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from trainyard.approvals import Round
from trainyard.documents.channel import Channel
from trainyard.errors import BadInput, CorruptFile, NotFound, TrainyardError
from trainyard.names import check_name, check_release_id
from trainyard.permissions import Act, Asker, refusal
from trainyard.release_report import read_release_report
from trainyard.reports.charts import NARROW_WIDTH, evidence_plots, level_plots, traffic_plot
from trainyard.reports.glance import glance, stages
from trainyard.reports.pages import compile_templates, render
from trainyard.reports.release import release_report_html
from trainyard.rollout.standing import commands_that_can_be_given
from trainyard.rollout.words import describe_entry
from trainyard.settings import Settings, get_settings
from trainyard.spec.environments import Environment, Environments
from trainyard.spec.loader import load_environments
from trainyard.spec.ways import Approval
from trainyard.store.factory import open_store
from trainyard.store.layout import gate_report_key
from trainyard.store.protocol import Store
from trainyard_airflow.identity import uses_fab
from trainyard_airflow.page import queries
from trainyard_airflow.page.access import Access, AirflowAccess
from trainyard_airflow.page.plugin import PREFIX
from trainyard_airflow.page.reader import Reader, Unreadable

ItemT = TypeVar("ItemT")

RELEASE_DAG = "neuron_release"
PROMOTE_DAG = "neuron_promote__"
ROLLBACK_DAG = "neuron_rollback__"
CONTROL_DAG = "neuron_control__"

REPORT_POLICY = "sandbox; default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'self'"
"""Stored reports get an origin of their own and run nothing, even when opened directly."""

OFFERED_RELEASES = 100
"""Releases that the form for a promotion offers, newest first."""

ROLLOUT_TASK = "rollout"
"""The task of a promotion that ends when it is marked as failed: then all traffic goes back."""

APPROVE_TASK = "approve"
"""The task of a promotion that asks people."""

MOST_POINTS = 240
"""Looks that a plot shows; of more, evenly chosen ones and the newest."""


@dataclass(frozen=True)
class Viewer:
    """The user of a request."""

    user: Any
    access: Access

    @property
    def name(self) -> str:
        """What Airflow calls the user."""
        return str(self.user.get_name())

    def sees(self, environment: str) -> bool:
        """May they see what an environment serves?"""
        return self.access.may(self.user, "read", f"{PROMOTE_DAG}{environment}")

    def sees_releases(self) -> bool:
        """May they see releases?"""
        return self.access.may(self.user, "read", RELEASE_DAG)

    def may_start(self, dag_id: str) -> bool:
        """May they start a run?"""
        return self.access.may(self.user, "start", dag_id)

    def may_mark(self, dag_id: str) -> bool:
        """May they mark a task of a run?"""
        return self.access.may(self.user, "mark", dag_id)

    def may_answer(self, dag_id: str) -> bool:
        """May they answer what a task asks people?"""
        return self.access.may(self.user, "answer", dag_id)


class Backing:
    """What the routes work with."""

    def __init__(self, reader: Reader, settings: Settings) -> None:
        self.reader = reader
        self.settings = settings
        self._read_environments = lru_cache(maxsize=1)(self._environments_of)

    def environments(self) -> Mapping[str, Environment]:
        """Return the environments of the file, in their order."""
        return self.file().environments

    def file(self) -> Environments:
        """Return the environments file; read again when it has changed."""
        try:
            found = self.settings.environments.stat()
            stamp = (found.st_mtime_ns, found.st_size)
        except OSError:
            stamp = None
        return self._read_environments(stamp)

    def _environments_of(self, stamp: tuple[int, int] | None) -> Environments:
        return load_environments(self.settings.environments)

    def named(self, channels: Sequence[Channel | Unreadable]) -> list[str]:
        """Return all environments: those of the file in their order, then those that only have
        channels."""
        names = list(self.environments())
        return names + sorted({each.environment for each in channels} - set(names))

    def shown(
        self, viewer: Viewer, channels: Sequence[Channel | Unreadable] | None = None
    ) -> list[str]:
        """Return the environments that somebody may see."""
        found = self.reader.channels() if channels is None else channels
        return [name for name in self.named(found) if viewer.sees(name)]


def create_page(
    *,
    access: Access | None = None,
    settings: Settings | None = None,
    store: Store | None = None,
) -> FastAPI:
    """Return the application.

    Args:
        access: who may do what; Airflow's login and auth manager unless a test says otherwise.
        settings: of this installation; those of the environment unless given.
        store: the settings' store unless given.
    """
    access = access or AirflowAccess()
    settings = settings or get_settings()
    backing = Backing(Reader(store or open_store(settings)), settings)

    login = Depends(access.user)

    async def signed_in(request: Request, user: Any = login) -> None:
        request.state.viewer = Viewer(user, access)

    app = FastAPI(
        title="Trainyard",
        dependencies=[Depends(signed_in)],
        # They would be routes without a login.
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    app.state.backing = backing
    for path, route in _ROUTES:
        app.get(path, response_class=HTMLResponse)(route)
    # Behind the login as well: without one, an unknown address looks like any other.
    app.api_route("/{path:path}", methods=_METHODS)(show_nothing)
    app.exception_handler(TrainyardError)(_on_error)
    app.exception_handler(StarletteHTTPException)(_on_http_error)
    return app


def warm(app: FastAPI) -> int:
    """Do what makes the first request slow: read all channels, compile the templates, draw the
    overview once.

    Returns how many channels there are. Raises TrainyardError if the store cannot be read.
    """
    backing: Backing = app.state.backing
    compile_templates("page/")
    channels = backing.reader.channels()
    environments = backing.named(channels)
    found = queries.overview(backing.reader, channels, environments)
    render(
        "page/overview.html.j2",
        overview=found,
        releases=found.releases,
        text="",
        show="all",
        environments=environments,
        nonce="",
        root="",
        airflow="",
    )
    return len(channels)


# --- routes -------------------------------------------------------------------------------------


def show_overview(
    request: Request,
    q: Annotated[str, Query(max_length=100)] = "",
    show: queries.Show = "all",
) -> Response:
    """All channels at a glance."""
    backing = _backing(request)
    channels = backing.reader.channels()
    shown = backing.shown(_viewer(request), channels)
    found = queries.overview(backing.reader, channels, shown, text=q, show=show)
    return _page(
        request,
        "overview",
        overview=found,
        releases=found.releases if _viewer(request).sees_releases() else {},
        text=q,
        show=show,
        environments=shown,
    )


def show_channel(request: Request, environment: str, model: str) -> Response:
    """A channel with its rollout, as it is now."""
    channel = _channel(request, environment, model)
    number = channel.rollout.number if channel.rollout else None
    return _page(request, "channel", **_channel_values(request, channel, number), live=True)


def show_rollout(request: Request, environment: str, model: str, number: int) -> Response:
    """One rollout of a channel, the last one or an earlier one."""
    channel = _channel(request, environment, model)
    values = _channel_values(request, channel, number)
    return _page(request, "channel", **values, live=values["is_current"])


def show_model(request: Request, model: str) -> Response:
    """All releases of a model."""
    viewer, reader = _viewer(request), _backing(request).reader
    _demand(viewer.sees_releases(), "releases")
    releases = queries.releases_of(reader, check_name(model, "Model"))
    shown = set(_backing(request).shown(viewer))
    channels = [
        each
        for each in reader.channels(model=model)
        if isinstance(each, Channel) and each.environment in shown
    ]
    roles = _roles(channels)
    return _page(request, "model", model=model, releases=releases, roles=roles)


def show_release(request: Request, model: str, release_id: str) -> Response:
    """All that is known of a release."""
    view = _release_view(request, model, release_id)
    return _page(request, "release", view=view, release=view.release)


def show_difference(
    request: Request, model: str, release_id: str, against: Annotated[str, Query(max_length=100)]
) -> Response:
    """Two releases of a model, field by field."""
    _demand(_viewer(request).sees_releases(), "releases")
    reader = _backing(request).reader
    after = queries.read_release(reader, model, check_release_id(release_id))
    before = queries.read_release(reader, model, check_release_id(against))
    found = queries.difference_of(before, after)
    return _page(request, "difference", before=before, after=after, found=found)


def show_report(request: Request, plan_id: str, target: str, gate: str) -> Response:
    """A stored report of a gate, as it is, without any rights."""
    _demand(_viewer(request).sees_releases(), "reports")
    data = _backing(request).reader.store.read(gate_report_key(plan_id, target, gate)).data
    return HTMLResponse(data, headers=_headers(REPORT_POLICY))


def show_release_report(request: Request, model: str, release_id: str) -> Response:
    """The report of a release as one page, as `trainyard report` writes it."""
    _demand(_viewer(request).sees_releases(), "releases")
    check_name(model, "Model")
    backing = _backing(request)
    report = read_release_report(
        backing.reader.store, model, check_release_id(release_id), backing.settings
    )
    return HTMLResponse(release_report_html(report), headers=_headers(REPORT_POLICY))


def show_run(request: Request, dag_id: str, run_id: str) -> Response:
    """What a run of one of our DAGs is about: the tab of a run in Airflow's interface."""
    environment = _environment_of(dag_id)
    if environment:
        return _rollout_run(request, environment, dag_id, run_id)
    if dag_id == RELEASE_DAG:
        _demand(_viewer(request).sees_releases(), "releases")
        found = queries.release_run(_backing(request).reader, dag_id, run_id)
        if found is not None:
            return _page(request, "release_run", run=found, run_id=run_id)
        # Whoever has just asked for it looks on: the page becomes that of the plan by itself.
        message = "This run has made no plan yet. Its task `plan` says why if it failed."
        return _page(
            request, "message", heading="Nothing to show yet", message=message, hint="", live=True
        )
    message = "This DAG moves no model: Trainyard has nothing to show for its runs."
    return _page(request, "message", heading="Nothing to show", message=message, hint="")


def show_nothing(request: Request) -> Response:
    """Whatever is no page, or would change one."""
    if request.method == "GET":
        raise HTTPException(404, "Not Found")
    raise HTTPException(405, "Method Not Allowed")


_METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]

_ROUTES: tuple[tuple[str, Callable[..., Response]], ...] = (
    ("/", show_overview),
    ("/channels/{environment}/{model}", show_channel),
    ("/channels/{environment}/{model}/rollouts/{number}", show_rollout),
    ("/models/{model}", show_model),
    ("/releases/{model}/{release_id}", show_release),
    ("/releases/{model}/{release_id}/diff", show_difference),
    ("/releases/{model}/{release_id}/report", show_release_report),
    ("/reports/{plan_id}/{target}/{gate}", show_report),
    ("/runs/{dag_id}/{run_id:path}", show_run),
)


# --- their parts --------------------------------------------------------------------------------


def _backing(request: Request) -> Backing:
    backing: Backing = request.app.state.backing
    return backing


def _viewer(request: Request) -> Viewer:
    viewer: Viewer = request.state.viewer
    return viewer


def _demand(allowed: bool, what: str) -> None:
    if not allowed:
        raise HTTPException(403, f"You may not see {what}: Airflow does not let you read the DAG.")


def _channel(request: Request, environment: str, model: str) -> Channel:
    check_name(environment, "Environment")
    check_name(model, "Model")
    _demand(_viewer(request).sees(environment), f"the environment {environment}")
    reader = _backing(request).reader
    try:
        return reader.channel(model, environment)
    except NotFound as error:
        if queries.approval_rounds(reader, model, environment):
            # The very first promotion waits for people: there is nothing else to show yet.
            return Channel(model=model, environment=environment)
        raise NotFound(
            f"{model} has nothing in {environment} yet.",
            hint=f"Promote a release: DAG `{PROMOTE_DAG}{environment}`.",
        ) from error


def _channel_values(request: Request, channel: Channel, number: int | None) -> dict[str, Any]:
    reader = _backing(request).reader
    view = None if number is None else queries.rollout_view(reader, channel, number)
    rollout = view.rollout if view else None
    is_current = view is None or rollout is not None
    return {
        "channel": channel,
        "row": glance(channel),
        "view": view,
        "rollout": rollout,
        "stages": stages(rollout) if rollout else (),
        **(_plots(view) if view else {"plots": (), "traffic": None, "levels": ()}),
        "numbers": _numbers(channel),
        "events": [(entry, describe_entry(entry)) for entry in reversed(view.events)]
        if view
        else [],
        "is_current": is_current,
        **(_approval(request, channel) if is_current else {"questions": (), "answers": False}),
        "run": rollout.driver.run_id if rollout else "",
        "actions": _actions(request, channel) if is_current else None,
    }


@dataclass(frozen=True)
class Question:
    """A round of approval, as somebody sees it."""

    round: Round
    waits: bool
    may_answer: bool
    """May this user answer, and would it count?"""
    why_not: str

    @property
    def path(self) -> str:
        """Where the answer goes, below Airflow's address."""
        dag_id, _, run_id = self.round.run_id.partition("/")
        return (
            f"/api/v2/dags/{quote(dag_id, safe='')}/dagRuns/{quote(run_id, safe='')}"
            f"/taskInstances/{APPROVE_TASK}/-1/hitlDetails"
        )


def _approval(request: Request, channel: Channel) -> dict[str, Any]:
    """Return what promotions to a channel ask and have asked people, newest first, and whether this
    user may answer such questions."""
    rounds = queries.approval_rounds(_backing(request).reader, channel.model, channel.environment)
    if not rounds and _approval_of(request, channel.environment) is None:
        return {"questions": (), "answers": False}
    answers = _viewer(request).may_answer(f"{PROMOTE_DAG}{channel.environment}")
    now = datetime.now(UTC)
    questions = []
    for each in rounds:
        why_not = _why_not(request, each) if answers else ""
        waits = each.waits(now)
        questions.append(Question(each, waits, waits and answers and not why_not, why_not))
    return {"questions": tuple(questions), "answers": answers}


def _approval_of(request: Request, environment: str) -> Approval | None:
    found = _backing(request).environments().get(environment)
    return found.approval if found is not None else None


def _why_not(request: Request, asked: Round) -> str:
    """Return why the user's answer would not count; nothing if it would."""
    name = _viewer(request).name
    approval = _approval_of(request, asked.environment)
    if not _permitted(request, "approve", asked.environment):
        return "You are not among those who may approve."
    if name == asked.requested_by and not (approval and approval.by_requester):
        return "Who asks for a promotion does not approve it."
    if name in asked.approved:
        return "You have approved it; somebody else has to as well."
    return ""


def _plots(view: queries.RolloutView) -> dict[str, Any]:
    """Return the drawings of a rollout."""
    moments = set(_spread(sorted({block.t for block in view.blocks})))
    blocks = [block for block in view.blocks if block.t in moments]
    return {
        "plots": evidence_plots(_spread(view.verdicts), width=NARROW_WIDTH),
        "traffic": traffic_plot(view.looks, view.release_id, width=NARROW_WIDTH),
        "levels": level_plots(blocks, width=NARROW_WIDTH),
    }


def _spread(items: Sequence[ItemT]) -> Sequence[ItemT]:
    """Return at most `MOST_POINTS` of the items, evenly chosen, the last one among them."""
    step = max(1, -(-len(items) // MOST_POINTS))
    return items[::-step][::-1]


def _numbers(channel: Channel) -> list[int]:
    """Return the numbers of the rollouts that the history still knows, newest first."""
    known = {entry.rollout for entry in channel.history if entry.rollout is not None}
    if channel.rollout is not None:
        known.add(channel.rollout.number)
    return sorted(known, reverse=True)


@dataclass(frozen=True)
class Actions:
    """What the user may do with a channel."""

    promote_dag: str
    """Empty: they may not."""
    rollback_dag: str
    abort_dag: str
    abort_run: str
    abort_task: str
    control_dag: str
    """To pause, to resume and to promote now; empty: they may not."""
    releases: tuple[str, ...]
    """Those that may be promoted, newest first."""
    earlier: tuple[str, ...]
    """Those that a rollback can go to, newest first."""
    undoes: bool
    """Is there a promotion that a rollback without a release would undo?"""

    @property
    def any(self) -> bool:
        """May they do anything?"""
        return bool(self.promote_dag or self.rollback_dag or self.abort_dag or self.control_dag)


def _permitted(request: Request, act: Act, environment: str) -> bool:
    """Tell whether the environments file lets the user do this; Airflow's rights come on top."""
    # What a button asks for, Airflow checks by role.
    asker = Asker(_viewer(request).name, checked_roles=uses_fab())
    return refusal(_backing(request).file(), act, asker, environment) is None


def _actions(request: Request, channel: Channel) -> Actions:
    viewer = _viewer(request)
    promote = f"{PROMOTE_DAG}{channel.environment}"
    rollback = f"{ROLLBACK_DAG}{channel.environment}"
    owner = channel.rollout.driver.run_id if channel.rollout else ""
    dag_id, _, run_id = owner.partition("/")
    # A rollback is what an abort would do; there is nothing to abort in it.
    may_rollback = _permitted(request, "rollback", channel.environment)
    may_abort = may_rollback and dag_id == promote and viewer.may_mark(dag_id)
    permitted = _permitted(request, "promote", channel.environment)
    may_promote = permitted and viewer.may_start(promote)
    control = f"{CONTROL_DAG}{channel.environment}"
    return Actions(
        promote_dag=promote if may_promote else "",
        control_dag=control if permitted and viewer.may_start(control) else "",
        rollback_dag=rollback if may_rollback and viewer.may_start(rollback) else "",
        abort_dag=dag_id if may_abort else "",
        abort_run=run_id,
        abort_task=ROLLOUT_TASK,
        releases=_promotable(request, channel) if may_promote else (),
        earlier=tuple(dict.fromkeys(track.release_id for track in channel.previous)),
        undoes="rollback" in commands_that_can_be_given(channel, datetime.now(UTC)),
    )


def _promotable(request: Request, channel: Channel) -> tuple[str, ...]:
    backing = _backing(request)
    environment = backing.environments().get(channel.environment)
    try:
        releases = queries.releases_of(backing.reader, channel.model)
    except NotFound:
        return ()
    stable = channel.stable.release_id if channel.stable else ""
    fitting = [
        release.release_id
        for release in releases
        if release.release_id != stable
        and (environment is None or release.target.name == environment.target)
    ]
    return tuple(fitting[:OFFERED_RELEASES])


def _roles(channels: list[Channel]) -> dict[str, list[str]]:
    """Return where each release serves, in words."""
    roles: dict[str, list[str]] = {}
    for channel in channels:
        for role, track in (("stable", channel.stable), ("candidate", channel.candidate)):
            if track is not None:
                roles.setdefault(track.release_id, []).append(f"{role} in {channel.environment}")
    return roles


def _release_view(request: Request, model: str, release_id: str) -> queries.ReleaseView:
    viewer, backing = _viewer(request), _backing(request)
    _demand(viewer.sees_releases(), "releases")
    check_name(model, "Model")
    view = queries.release_view(
        backing.reader, model, check_release_id(release_id), backing.settings
    )
    shown = set(backing.shown(viewer))
    places = tuple(place for place in view.places if place.environment in shown)
    return queries.with_places(view, places)


def _environment_of(dag_id: str) -> str:
    """Return the environment that a DAG moves traffic in; empty if it moves none."""
    for start in (PROMOTE_DAG, ROLLBACK_DAG):
        if dag_id.startswith(start):
            return check_name(dag_id.removeprefix(start), "Environment")
    return ""


def _rollout_run(request: Request, environment: str, dag_id: str, run_id: str) -> Response:
    _demand(_viewer(request).sees(environment), f"the environment {environment}")
    found = queries.rollout_of_run(_backing(request).reader, environment, dag_id, run_id)
    if found is None:
        return _page(
            request,
            "message",
            heading="No rollout",
            message="This run has started no rollout, or it is too long ago: the channel's history "
            "no longer names it.",
            hint="If it waits for approval, the channel's page asks for it; if it was refused, the "
            "log of its first task says why.",
        )
    channel, number = found
    values = _channel_values(request, channel, number)
    return _page(request, "channel", **values, live=values["is_current"])


# --- answers ------------------------------------------------------------------------------------


def _page(request: Request, name: str, *, status: int = 200, **values: Any) -> HTMLResponse:
    """Return a page. Its scripts and styles carry a nonce; nothing else may run or load."""
    nonce = secrets.token_urlsafe(16)
    root = str(request.scope.get("root_path", "")).rstrip("/")
    html = render(
        f"page/{name}.html.j2",
        **values,
        plot_width=NARROW_WIDTH,
        nonce=nonce,
        root=root,
        airflow=root.removesuffix(PREFIX),
    )
    policy = (
        f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; "
        "connect-src 'self'; form-action 'self'; frame-src 'self'; frame-ancestors 'self'; "
        "base-uri 'none'"
    )
    return HTMLResponse(html, status_code=status, headers=_headers(policy))


def _headers(policy: str) -> dict[str, str]:
    return {
        "Content-Security-Policy": policy,
        "Cache-Control": "no-store",
        "Referrer-Policy": "same-origin",
        "X-Content-Type-Options": "nosniff",
    }


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, TrainyardError)
    statuses = {NotFound: 404, CorruptFile: 500, BadInput: 400}
    status = next((code for kind, code in statuses.items() if isinstance(error, kind)), 503)
    return _page(
        request,
        "message",
        status=status,
        heading="That cannot be shown",
        message=error.message,
        hint=error.hint,
    )


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    headings = {401: "Please log in to Airflow", 403: "Not for you", 404: "No such page"}
    return _page(
        request,
        "message",
        status=error.status_code,
        heading=headings.get(error.status_code, "That did not work"),
        message=str(error.detail),
        hint="Open Airflow, log in and come back." if error.status_code == 401 else "",
    )
