"""Telling people: that it arrives, that it ends, and that it never fails what it is about."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from tests.notice_servers import Webhook, mail_server, webhook
from tests.unit.plugins.conftest import make_context, write_environments
from tests.unit.yard import Yard

from trainyard.documents.channel import HistoryEntry
from trainyard.notices import Notice

TOPIC = "arn:aws:sns:us-west-2:123456789012:yard"
NOTICE = Notice(
    id="adder/production/2/7/held",
    kind="held",
    model="adder",
    environment="production",
    release_id="adder-0123456789ab",
    text="Undecided <@channel> & quiet.",
    who="ada",
    at=datetime(2026, 11, 27, 12, 0, tzinfo=UTC),
    run="neuron_promote__production/p-1",
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainyard_airflow.notify.PAUSES_S", (0.0, 0.0))
    monkeypatch.setenv("AIRFLOW__API__BASE_URL", "https://airflow.example/sub")


@pytest.fixture
def yard_told(yard: Yard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Have these ways of telling in production."""

    def use(*ways: Mapping[str, Any], **connections: Mapping[str, Any]) -> None:
        write_environments(tmp_path, monkeypatch, {"notify": list(ways)})
        for name, connection in connections.items():
            monkeypatch.setenv(f"AIRFLOW_CONN_{name.upper()}", json.dumps(connection))

    return use


def tell(notice: Notice = NOTICE) -> None:
    from trainyard_airflow.notify import tell as tell_now

    tell_now(notice, [notice.environment])


def hook_connection(hook: Webhook) -> dict[str, str]:
    return {"conn_type": "http", "password": hook.url()}


def test_a_webhook_gets_everything_as_json(yard_told: Any) -> None:
    with webhook() as hook:
        yard_told({"kind": "webhook", "connection": "hook"}, hook=hook_connection(hook))
        tell()
    (body,) = hook.bodies
    assert body["headline"] == "adder-0123456789ab is held in production: the judge cannot decide"
    assert (body["kind"], body["text"], body["who"]) == ("held", NOTICE.text, "ada")
    assert body["link"] == (
        "https://airflow.example/sub/plugin/trainyard/trainyard/channels/production/adder"
    )
    assert hook.keys == [NOTICE.id]


def test_nothing_in_a_text_becomes_a_mention_in_slack(yard_told: Any) -> None:
    with webhook() as hook:
        connection = {"conn_type": "slackwebhook", "host": hook.url(""), "password": "T0/B0/token"}
        yard_told({"kind": "slack", "connection": "slack"}, slack=connection)
        tell()
    assert hook.paths == ["/T0/B0/token"]
    text = hook.bodies[0]["text"]
    assert "Undecided &lt;@channel&gt; &amp; quiet." in text
    assert "asked for by ada" in text
    assert "|Look at it in Trainyard>" in text


@pytest.mark.parametrize("answers", [(500,), (429, 503)])
def test_a_webhook_that_may_answer_later_is_asked_again(
    yard_told: Any, answers: tuple[int, ...]
) -> None:
    with webhook(*answers) as hook:
        yard_told({"kind": "webhook", "connection": "hook"}, hook=hook_connection(hook))
        tell()
    assert hook.keys == [NOTICE.id] * (len(answers) + 1)


@pytest.mark.parametrize("answer", [404, 302])
def test_one_that_says_no_is_told_in_the_log_without_its_address(
    yard_told: Any, caplog: pytest.LogCaptureFixture, answer: int
) -> None:
    caplog.set_level(logging.DEBUG)
    with webhook(answer) as hook:
        yard_told({"kind": "webhook", "connection": "hook"}, hook=hook_connection(hook))
        tell()
    assert len(hook.bodies) == 1
    assert f"it answered {answer}" in caplog.text
    assert "the-secret" not in caplog.text


def test_one_that_is_not_there_stops_no_other(
    yard_told: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with webhook() as hook, webhook() as gone:
        pass
    with webhook() as hook:
        yard_told(
            {"kind": "webhook", "connection": "gone"},
            {"kind": "webhook", "connection": "missing"},
            {"kind": "slack", "connection": "empty"},
            {"kind": "webhook", "connection": "hook"},
            gone=hook_connection(gone),
            empty={"conn_type": "http", "host": "ftp://x"},
            hook=hook_connection(hook),
        )
        tell()
    assert len(hook.bodies) == 1
    assert "no answer (ConnectError)" in caplog.text
    assert "(connection missing)" in caplog.text
    assert "has no address" in caplog.text
    assert "the-secret" not in caplog.text


def test_nobody_waits_for_one_that_hangs(
    yard_told: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("trainyard_airflow.notify.BUDGET_S", 0.3)
    with webhook() as hook:
        hook.hold = threading.Event()
        yard_told({"kind": "webhook", "connection": "hook"}, hook=hook_connection(hook))
        tell()
        assert "nobody waits for it any longer" in caplog.text
        assert hook.bodies == []
        hook.hold.set()


def test_an_environments_file_that_cannot_be_read_fails_nothing(
    yard: Yard, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    write_environments(tmp_path, monkeypatch, {})
    (tmp_path / "environments.yaml").write_text("schema: [")
    tell()
    assert "cannot be found out" in caplog.text


def test_mail_arrives_at_everybody(yard_told: Any) -> None:
    with mail_server() as server:
        connection = {
            "conn_type": "smtp",
            "host": "127.0.0.1",
            "port": server.port,
            "extra": {
                "from_email": "yard@example.org",
                "disable_ssl": True,
                "disable_tls": True,
                "timeout": 5,
            },
        }
        way = {"kind": "email", "connection": "mail", "to": ["a@example.org", "b@example.org"]}
        yard_told(way, mail=connection)
        tell()
    (mail,) = server.mails
    assert server.recipients == ["a@example.org", "b@example.org"]
    subject = "[trainyard] adder-0123456789ab is held in production: the judge cannot decide"
    assert mail["Subject"].replace("\n", "") == subject
    assert mail["X-Trainyard-Notice"] == NOTICE.id
    (part,) = mail.iter_parts()  # type: ignore[attr-defined]
    assert "Undecided &lt;@channel&gt; &amp; quiet." in part.get_content()


def test_a_topic_gets_the_notice(yard_told: Any) -> None:
    from moto import mock_aws
    from moto.sns import sns_backends

    with mock_aws():
        topic = sns_backends["123456789012"]["us-west-2"].create_topic("yard")
        assert topic.arn == TOPIC
        keys = {"conn_type": "aws", "login": "testing", "password": "testing"}
        yard_told({"kind": "sns", "connection": "aws", "topic": TOPIC}, aws=keys)
        tell()
        ((_, message, subject, attributes, _),) = topic.sent_notifications
    body = json.loads(json.loads(message)["default"]) if "default" in message else {}
    assert body["kind"] == "held"
    assert subject.startswith("adder-0123456789ab is held")
    assert attributes["environment"]["Value"] == "production"


class TestWhatIsTold:
    @pytest.fixture
    def told(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Notice, list[str]]]:
        found: list[tuple[Notice, list[str]]] = []
        monkeypatch.setattr(
            "trainyard_airflow.notify.tell", lambda notice, among: found.append((notice, among))
        )
        return found

    def test_events_of_a_rollout(self, told: list[Any]) -> None:
        from trainyard.rollout.outbox import RolloutEvent
        from trainyard_airflow.notify import tell_rollout_event

        for event in ("weights", "rolled_back"):
            entry = HistoryEntry(at=NOTICE.at, generation=3, event=event, release_id="adder-1")
            tell_rollout_event(
                RolloutEvent(
                    model="adder", environment="staging", rollout=1, entry=entry, message="bad"
                ),
                run="d/r",
            )
        ((notice, among),) = told
        assert (notice.kind, notice.run, among) == ("rolled_back", "d/r", ["staging"])

    def test_a_gate_that_said_no(self, told: list[Any]) -> None:
        from types import SimpleNamespace

        from trainyard_airflow.exceptions import StepRefused
        from trainyard_airflow.notify import tell_gate_failed

        params = {"model": "adder", "environments": ["staging", "production"]}
        task = SimpleNamespace(task_id="target.accuracy_gate", target="cpu")
        context = make_context(params) | {"task": task, "exception": StepRefused("0.4 < 0.9.")}
        tell_gate_failed(context)
        tell_gate_failed({**context, "exception": RuntimeError("killed")})
        ((notice, among),) = told
        assert notice.headline == "adder did not pass its accuracy gate"
        assert notice.text == "Target cpu: 0.4 < 0.9."
        assert among == ["staging", "production"]

    async def test_a_run_that_is_late(self, told: list[Any]) -> None:
        from trainyard_airflow.notify import tell_stuck

        run = {
            "dag_id": "neuron_promote__production",
            "dag_run_id": "p-1",
            "conf": {"model": "adder", "release": "adder-0123456789ab"},
            "triggering_user_name": "ada",
        }
        await tell_stuck({"dag_run": run, "deadline": {}}, environment="production")
        ((notice, among),) = told
        assert notice.headline == "adder-0123456789ab takes too long in production"
        assert (notice.who, among) == ("ada", ["production"])

    test_a_run_that_is_late = pytest.mark.anyio(test_a_run_that_is_late)
