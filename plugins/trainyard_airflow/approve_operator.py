"""Asks people before a release goes anywhere, and keeps what they said."""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from airflow.providers.standard.operators.hitl import HITLOperator
from airflow.sdk import Context, Param

from trainyard_airflow.exceptions import StepRefused
from trainyard_airflow.identity import requested_by, uses_fab
from trainyard_airflow.links import REQUEST, ChannelLink, ReleaseLink, page_url
from trainyard_airflow.results import reported

if TYPE_CHECKING:
    from trainyard.approvals import Answer, Round
    from trainyard.spec.environments import Environment, Environments
    from trainyard.store.protocol import Store

APPROVE = "Approve"
REJECT = "Reject"
TASK = "approve"
"""Id of the task in every promotion."""

SIMPLE_AUTH = "airflow.api_fastapi.auth.managers.simple.simple_auth_manager.SimpleAuthManager"


class ApproveOperator(HITLOperator):
    """Wait until enough people have approved a promotion.

    The task waits without a worker and without a triggerer. Each answer is looked at here: one that
    does not count (not one of those who may, the requester's own, a second one of the same person)
    is kept as ignored, and the task goes on waiting. Time that runs out, and one rejection, fail
    the task. Nothing is approved by default.

    Args:
        environment: name of the environment; its file says who may approve, how many have to, and
            for how long it is waited.

    Returns who approved.
    """

    template_fields: Collection[str] = ("request",)
    operator_extra_links = (ReleaseLink(), ChannelLink())

    def __init__(self, *, environment: str, **kwargs: Any) -> None:
        # Airflow puts the params of the DAG there, which are no questions to whoever answers.
        kwargs.pop("params", None)
        super().__init__(
            subject=f"Promote to {environment}?",
            options=[APPROVE, REJECT],
            params={
                "note": Param(
                    "",
                    type="string",
                    maxLength=500,
                    title="Note",
                    description_md="Why; kept in the release's history.",
                    source="task",
                )
            },
            **kwargs,
        )
        self.environment = environment
        self.request = REQUEST

    def execute(self, context: Context) -> Any:
        """Ask, unless enough people have answered this run already."""
        request = _Request(context, self.environment)
        if request.is_stable:
            self.log.info("%s is stable in %s already.", request.release_id, self.environment)
            return []
        found = request.round()
        if found is not None and found.is_approved:
            return list(found.approved)
        if found is None or not found.waits(_now()):
            found = request.ask()
        self._wait(context, request, found)

    def execute_complete(self, context: Context, event: dict[str, Any]) -> Any:
        """Take an answer. Raises StepRefused if it was no, or if there was none in time."""
        request = _Request(context, self.environment)
        if "error" in event:
            return self._end(request, "closed", "", "nobody answered in time")
        answer = super().execute_complete(context, event)
        who = str((answer["responded_by_user"] or {}).get("name") or "")
        note = str((answer["params_input"] or {}).get("note") or "")
        found = request.round()
        if found is None or not found.waits(_now()):
            return self._end(request, "closed", who, "the answer came after the end")
        why = request.does_not_count(who, found)
        if why:
            self.log.warning("The answer of %s does not count: %s. Waiting on.", who, why)
            request.record("ignored", who, why)
        elif answer["chosen_options"] == [APPROVE]:
            request.record("approved", who, note)
            self.log.info("%s has approved %s. %s", who, request.release_id, note)
        else:
            return self._end(request, "rejected", who, note)
        found = request.round()
        if found is not None and found.is_approved:
            return list(found.approved)
        self._wait(context, request, found)

    def _wait(self, context: Context, request: _Request, found: Round | None) -> None:
        """Park the task until the next answer. Never returns."""
        assert found is not None
        self.subject = f"Promote {request.release_id} to {self.environment}?"
        self.body = request.body()
        self.assigned_users = request.assigned_users()
        self.response_timeout = max(found.expires_at - _now(), timedelta(seconds=1))
        super().execute(context)

    def _end(self, request: _Request, answer: Answer, who: str, note: str) -> None:
        """Write down that the answer is no. Never returns."""
        request.record(answer, who, note)
        said = f"{who} has rejected it" if answer == "rejected" else "it was not approved"
        with reported(
            request.context,
            model=request.model,
            environment=self.environment,
            release=request.release_id,
        ):
            raise StepRefused(
                f"{request.release_id} does not go to {self.environment}: {said}"
                f"{f' ({note})' if note else ''}."
            )


class _Request:
    """What a run asks for, and the store that remembers the answers."""

    def __init__(self, context: Any, name: str) -> None:
        from trainyard.settings import get_settings
        from trainyard.spec.loader import load_environments
        from trainyard_airflow.aws_connection import open_task_store

        self.context = context
        self.settings = get_settings()
        self.file: Environments = load_environments(self.settings.environments)
        self.name = name
        self.store: Store = open_task_store(self.settings)
        self.model = str(context["params"]["model"])
        self.release_id = str(context["params"]["release"])
        self.run_id = f"{context['dag'].dag_id}/{context['run_id']}"
        self.requester = requested_by(context)

    @property
    def environment(self) -> Environment:
        return self.file.environments[self.name]

    @property
    def is_stable(self) -> bool:
        from trainyard.rollout.channel_store import read_channel

        stable = read_channel(self.store, self.model, self.name).stable
        return stable is not None and stable.release_id == self.release_id

    def round(self) -> Round | None:
        from trainyard.approvals import round_of_run

        return round_of_run(
            self.store, self.model, self.release_id, environment=self.name, run_id=self.run_id
        )

    def ask(self) -> Round:
        """Begin a round, and tell people that they are asked."""
        from trainyard_airflow.notify import tell_of_run

        approval = self.environment.approval
        assert approval is not None, "the task is there only where approval is needed"
        expires_at = _now() + timedelta(seconds=approval.timeout_s)
        self.record(
            "asked",
            "",
            "",
            needs=approval.needs,
            expires_at=expires_at.isoformat(),
            requested_by=self.requester,
        )
        found = self.round()
        assert found is not None
        tell_of_run(
            self.context,
            "waiting_approval",
            f"{approval.needs} {'person has' if approval.needs == 1 else 'people have'} to approve "
            f"before {expires_at:%Y-%m-%d %H:%M} UTC.",
            environments=[self.name],
            release_id=self.release_id,
        )
        return found

    def record(self, answer: Answer, who: str, note: str, **details: Any) -> None:
        from trainyard.approvals import record_answer
        from trainyard.documents.base import Provenance

        record_answer(
            self.store,
            self.model,
            self.release_id,
            answer,
            environment=self.name,
            run_id=self.run_id,
            at=_now(),
            who=who,
            note=note,
            provenance=Provenance(requested_by=who or self.requester, dag_run=self.run_id),
            **details,
        )

    def does_not_count(self, who: str, found: Round) -> str:
        """Return why an answer of `who` does not count; nothing if it does."""
        from trainyard.permissions import Asker, refusal

        if not who:
            return "nobody knows who it was"
        why = refusal(self.file, "approve", Asker(who, checked_roles=uses_fab()), self.name)
        if why is not None:
            return why.message.rstrip(".")
        approval = self.environment.approval
        if who == self.requester and not (approval and approval.by_requester):
            return "whoever asks for a promotion does not approve it"
        if who in found.approved:
            return "they have approved already"
        return ""

    def assigned_users(self) -> list[Any] | None:
        """Return those whose answers Airflow itself takes; None if their ids are not all known."""
        from trainyard.permissions import allowed_of, people

        allowed = allowed_of(self.file, "approve", self.name)
        if allowed is None or allowed.roles or self.environment.approval is None:
            return None
        ids = dict(self.environment.approval.user_ids)
        names = people(allowed, self.file.groups)
        if _is_simple_auth():
            ids = {name: name for name in names} | ids
        if not all(name in ids for name in names):
            return None
        return [{"id": ids[name], "name": name} for name in names]

    def body(self) -> str:
        """Return the report that people decide by."""
        from trainyard.documents.measurement import GateVerdict
        from trainyard.errors import NotFound
        from trainyard.releases import list_verdicts, load_release
        from trainyard.reports.approval import approval_request
        from trainyard.rollout.channel_store import read_channel
        from trainyard.store.documents import read_document

        release = load_release(self.store, self.model, self.release_id, self.settings)
        verdicts = []
        for each in list_verdicts(self.store, self.model, self.release_id, self.settings):
            try:
                verdicts.append(read_document(self.store, each.subject["key"], GateVerdict))
            except NotFound:
                continue
        assert self.environment.approval is not None
        return approval_request(
            release,
            read_channel(self.store, self.model, self.name),
            verdicts,
            requested_by=self.requester,
            reason=str(self.context["params"].get("reason") or ""),
            needs=self.environment.approval.needs,
            page=page_url("").rstrip("/"),
        )


def _is_simple_auth() -> bool:
    from airflow.configuration import conf

    return bool(conf.get("core", "auth_manager", fallback=SIMPLE_AUTH) == SIMPLE_AUTH)


def _now() -> datetime:
    return datetime.now(UTC)
