"""Tells people: webhooks, Slack, e-mail, SNS.

A notice that cannot be given is told in the log and nothing else: it never fails what it is about.
All ways are tried at once, each for a few seconds; nobody waits longer, so that a rollout goes on.
Addresses and credentials come from Airflow's connections and appear in no log.
"""

from __future__ import annotations

import html
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from trainyard.notices import Notice, notice_of, ways_of_telling
from trainyard.spec.environments import Environments
from trainyard.spec.ways import NoticeKind, Notify

if TYPE_CHECKING:
    from trainyard.rollout.outbox import RolloutEvent

log = logging.getLogger(__name__)

BUDGET_S = 15.0
"""Seconds that telling may take, all ways together. A lease lasts at least eight times as long."""

ATTEMPT_S = 4.0
"""Seconds that a webhook may take to answer, each time."""

PAUSES_S = (0.5, 1.5)
"""Seconds before the second and the third try of a webhook."""

SLACK = "https://hooks.slack.com/services"
_MARKS = {
    "promoted": ":white_check_mark:",
    "rolled_back": ":leftwards_arrow_with_hook:",
    "withdrawn": ":leftwards_arrow_with_hook:",
    "held": ":pause_button:",
    "slo_missed": ":rotating_light:",
    "gate_failed": ":no_entry:",
    "waiting_approval": ":raised_hand:",
    "stuck": ":hourglass:",
}


class Connection(Protocol):
    """What we read of an Airflow connection."""

    host: str | None
    schema: str | None
    port: int | None
    password: str | None


class _Quiet(logging.Filter):
    """Keeps httpx from logging the address of a request, which is a secret here."""

    def __init__(self) -> None:
        super().__init__()
        self.secret = threading.local()

    def filter(self, record: logging.LogRecord) -> bool:
        return not getattr(self.secret, "now", False)


_quiet = _Quiet()
logging.getLogger("httpx").addFilter(_quiet)


# --- what to tell of ------------------------------------------------------------------------------


def tell_rollout_event(event: RolloutEvent, *, run: str = "") -> None:
    """Tell whoever wants to know of an event of a rollout."""
    notice = notice_of(
        event.model, event.environment, event.rollout, event.entry, event.message, run=run
    )
    if notice is not None:
        tell(notice, [event.environment])


def tell_of_run(
    context: Any,
    kind: NoticeKind,
    text: str,
    *,
    environments: Iterable[str],
    what: str = "",
    release_id: str = "",
) -> None:
    """Tell whoever wants to know of something about the run of a task.

    Args:
        context: of the task.
        kind: what happened.
        text: in words.
        environments: those that it is about.
        what: name of the gate.
        release_id: of which release.
    """
    from trainyard_airflow.identity import requested_by

    names = list(environments)
    run = f"{context['dag'].dag_id}/{context['run_id']}"
    ti = context.get("ti")
    attempt = getattr(ti, "try_number", 1)
    notice = Notice(
        id=f"{run}/{what or kind}/{attempt}",
        kind=kind,
        model=str(context["params"].get("model", "")),
        environment=names[0] if len(names) == 1 else "",
        release_id=release_id,
        what=what,
        text=text,
        who=requested_by(context),
        at=_now(),
        run=run,
    )
    tell(notice, names)


def tell_gate_failed(context: Any) -> None:
    """Tell that a gate said no: `on_failure_callback` of a gate's task. Anything else is Airflow's
    own to alarm about."""
    from trainyard_airflow.exceptions import StepRefused

    error = context.get("exception")
    if isinstance(error, StepRefused):
        task = context["task"]
        gate, target = task.task_id.rpartition(".")[2].removesuffix("_gate"), task.target
        tell_of_run(
            context,
            "gate_failed",
            f"Target {target}: {error}" if target else str(error),
            environments=context["params"].get("environments") or (),
            what=gate,
        )


async def tell_stuck(context: Mapping[str, Any], environment: str = "") -> None:
    """Tell that a run has not ended in time: the callback of a DAG's deadline, in the triggerer."""
    import asyncio

    run = context["dag_run"]
    conf = run.get("conf") or {}
    notice = Notice(
        id=f"{run['dag_id']}/{run['dag_run_id']}/stuck",
        kind="stuck",
        model=str(conf.get("model", "")),
        environment=environment,
        release_id=str(conf.get("release") or ""),
        text=f"The run {run['dag_run_id']} of {run['dag_id']} has not ended in time. It is not "
        "stopped: see what its tasks wait for.",
        who=str(run.get("triggering_user_name") or ""),
        at=_now(),
        run=f"{run['dag_id']}/{run['dag_run_id']}",
    )
    asked_for = [environment] if environment else conf.get("environments") or ()
    await asyncio.to_thread(tell, notice, list(asked_for))


# --- telling --------------------------------------------------------------------------------------


def tell(notice: Notice, environments: Iterable[str]) -> None:
    """Tell a notice in all ways that want it; never raises, and returns in `BUDGET_S`.

    Args:
        notice: what happened.
        environments: those that it is about; their `notify` counts beside the file's own.
    """
    try:
        ways = ways_of_telling(_file(), notice.kind, environments)
    except Exception:
        log.exception("Who is to be told of %s cannot be found out", notice.id)
        return
    if not ways:
        return
    notice = notice.model_copy(update={"link": _link(notice)})
    threads = [
        threading.Thread(target=_tell_one, args=(way, notice), daemon=True, name="trainyard-notice")
        for way in ways
    ]
    deadline = time.monotonic() + BUDGET_S
    for thread in threads:
        thread.start()
    for way, thread in zip(ways, threads, strict=True):
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            log.warning(
                "Telling of %s by %s (%s) takes more than %g s; nobody waits for it any longer.",
                notice.id, way.kind, way.connection, BUDGET_S,
            )  # fmt: skip


def _tell_one(way: Notify, notice: Notice) -> None:
    try:
        _SENDERS[way.kind](way, notice)
    except Exception as error:
        # Messages of libraries may hold the address.
        why = str(error) if isinstance(error, NotTold) else type(error).__name__
        log.warning(
            "%s was not told by %s (connection %s): %s", notice.id, way.kind, way.connection, why
        )
    else:
        log.info("Told by %s (connection %s): %s", way.kind, way.connection, notice.headline)


class NotTold(Exception):
    """A notice could not be given; the message holds no secret."""


def _file() -> Environments:
    from trainyard.settings import get_settings
    from trainyard.spec.loader import load_environments

    return load_environments(get_settings().environments)


def _link(notice: Notice) -> str:
    """Return where people see more: the tab of the run, or the page of the channel."""
    from trainyard_airflow.links import airflow_url, page_url

    base = airflow_url()
    if not base:
        return ""
    if notice.environment and notice.model:
        return page_url(f"channels/{notice.environment}/{notice.model}")
    dag_id, _, run_id = notice.run.partition("/")
    return f"{base}/dags/{dag_id}/runs/{run_id}" if run_id else base


def _now() -> Any:
    from datetime import UTC, datetime

    return datetime.now(UTC)


# --- ways -----------------------------------------------------------------------------------------


def _send_webhook(way: Notify, notice: Notice) -> None:
    _post(webhook_url(_connection(way), ""), notice.as_json(), notice.id)


def _send_slack(way: Notify, notice: Notice) -> None:
    _post(webhook_url(_connection(way), SLACK), slack_message(notice), notice.id)


def _send_email(way: Notify, notice: Notice) -> None:
    from airflow.providers.smtp.hooks.smtp import SmtpHook

    with SmtpHook(smtp_conn_id=way.connection) as hook:
        hook.send_email_smtp(
            to=list(way.to),
            subject=f"[trainyard] {notice.headline}",
            html_content=html_message(notice),
            custom_headers={"X-Trainyard-Notice": notice.id},
        )


def _send_sns(way: Notify, notice: Notice) -> None:
    import json

    from airflow.providers.amazon.aws.hooks.sns import SnsHook
    from botocore.config import Config

    assert way.topic is not None
    hook = SnsHook(
        aws_conn_id=way.connection,
        region_name=way.topic.split(":")[3],
        config=Config(connect_timeout=3, read_timeout=4, retries={"total_max_attempts": 3}),
    )
    hook.publish_to_target(
        way.topic,
        json.dumps(notice.as_json(), ensure_ascii=False, indent=1),
        # SNS takes 100 characters of ASCII.
        subject=notice.headline.encode("ascii", "replace").decode()[:100],
        message_attributes={"kind": notice.kind, "environment": notice.environment or "none"},
    )


_SENDERS: Mapping[str, Callable[[Notify, Notice], None]] = {
    "webhook": _send_webhook,
    "slack": _send_slack,
    "email": _send_email,
    "sns": _send_sns,
}


def _connection(way: Notify) -> Connection:
    from airflow.sdk import BaseHook

    connection: Connection = BaseHook.get_connection(way.connection)
    return connection


def webhook_url(connection: Connection, base: str) -> str:
    """Return the address of a webhook.

    It is the password, if that is a whole address (then Airflow masks all of it in logs); else the
    host (or `base`), with the password as the rest of the path, as Airflow's Slack provider has it.

    Raises:
        NotTold: there is none.
    """
    secret = (connection.password or "").strip()
    if secret.startswith(("https://", "http://")):
        return secret
    host = (connection.host or "").strip().rstrip("/")
    if host and "://" not in host:
        scheme = connection.schema or "https"
        host = f"{scheme}://{host}" + (f":{connection.port}" if connection.port else "")
    url = "/".join(part for part in (host or base, secret.strip("/")) if part)
    if not url.startswith(("https://", "http://")):
        raise NotTold("the connection has no address: put the whole one into its password")
    return url


def _post(url: str, body: Mapping[str, Any], notice_id: str) -> None:
    """Post JSON; try again when that can help. Raises NotTold."""
    import httpx

    _quiet.secret.now = True
    try:
        with httpx.Client(timeout=ATTEMPT_S, follow_redirects=False) as client:
            why = ""
            for pause_s in (0.0, *PAUSES_S):
                time.sleep(pause_s)
                try:
                    answer = client.post(url, json=body, headers={"Idempotency-Key": notice_id})
                except httpx.HTTPError as error:
                    why = f"no answer ({type(error).__name__})"
                    continue
                if answer.is_success:
                    return
                why = f"it answered {answer.status_code}"
                if answer.status_code < 500 and answer.status_code != 429:
                    break
            raise NotTold(why)
    finally:
        _quiet.secret.now = False


def slack_message(notice: Notice) -> dict[str, Any]:
    """Return a notice as Slack's incoming webhooks take it."""
    lines = [f"{_MARKS[notice.kind]} *{_slack(notice.headline)}*", _slack(notice.text)]
    details = [f"asked for by {notice.who}" if notice.who else "", notice.run]
    lines += [_slack(" · ".join(detail for detail in details if detail))]
    if notice.link:
        lines.append(f"<{notice.link}|Look at it in Trainyard>")
    return {"text": "\n".join(line for line in lines if line), "unfurl_links": False}


def _slack(text: str) -> str:
    """Return text that Slack shows as it is: no mention and no link can be made of it."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def html_message(notice: Notice) -> str:
    """Return a notice as the body of an e-mail."""
    rows = {
        "Model": notice.model,
        "Environment": notice.environment,
        "Release": notice.release_id,
        "Asked for by": notice.who,
        "Run": notice.run,
        "At": notice.at.strftime("%Y-%m-%d %H:%M:%S UTC"),
    }
    cells = "".join(
        f"<tr><th align='left'>{name}</th><td>{html.escape(value)}</td></tr>"
        for name, value in rows.items()
        if value
    )
    link = html.escape(notice.link, quote=True)
    more = f'<p><a href="{link}">Look at it in Trainyard</a></p>' if link else ""
    return (
        f"<h2>{html.escape(notice.headline)}</h2><p>{html.escape(notice.text)}</p>"
        f"<table>{cells}</table>{more}"
    )
