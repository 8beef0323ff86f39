"""The exporter reads a store, serves what it saw, and says how old that is."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from tests.serving_world import ENVIRONMENT, MODEL, NOW, make_channel, put_channel
from typer.testing import CliRunner

from trainyard import cli
from trainyard.documents.status import StepStatus
from trainyard.errors import Transient
from trainyard.metrics.page import Exporter, text_of
from trainyard.metrics.reader import MetricsReader
from trainyard.serving.guard_events import GuardEvent, write_event
from trainyard.serving.kubernetes.guard_metrics import serve_pages
from trainyard.settings import get_settings
from trainyard.store.folder import FolderStore
from trainyard.store.layout import status_key
from trainyard.store.protocol import Entry, Stored

LAST_LOOK = "trainyard_metrics_last_look_timestamp_seconds "


class Watched(FolderStore):
    """A folder that counts what is read, and can be away."""

    reads = 0
    away = False

    def read(self, key: str) -> Stored:
        self.reads += 1
        return super().read(key)

    def list(self, prefix: str) -> Iterator[Entry]:
        if self.away:
            raise Transient("The store is away.")
        return super().list(prefix)


@pytest.fixture
def store(tmp_path: Path) -> Watched:
    made = Watched(tmp_path / "store")
    put_channel(made, make_channel())
    put_status(made, "done")
    return made


def put_status(store: FolderStore, state: str) -> None:
    document = StepStatus(
        plan_id="adder-1",
        step="compile",
        target="cpu",
        state=state,  # type: ignore[arg-type]
        started_at=NOW,
        updated_at=NOW + timedelta(seconds=len(state)),
    )
    store.put(status_key("adder-1", "compile", "cpu"), document.to_bytes())


def test_what_did_not_change_is_not_read_again(store: Watched) -> None:
    reader = MetricsReader(store)
    reader.look()
    before = store.reads

    reader.look()
    assert store.reads == before
    put_status(store, "running")
    (status,) = reader.look().statuses
    assert status.state == "running"
    assert store.reads == before + 1


def test_the_guards_deeds_are_counted_by_the_names_of_their_documents(store: Watched) -> None:
    for event in ("fuse", "following"):
        write_event(
            store,
            GuardEvent(
                model=MODEL,
                environment=ENVIRONMENT,
                rollout=1,
                at=datetime.now(UTC),
                event=event,  # type: ignore[arg-type]
                reason="r",
                release_id="x",
                weights={},
            ),
        )
    trace = MetricsReader(store).look().traces[(ENVIRONMENT, MODEL)]

    assert dict(trace.guard_events) == {"fuse": 1}


def test_a_document_that_nobody_can_parse_is_counted_and_harms_no_other(store: Watched) -> None:
    store.put("status/adder-2/compile/cpu.json", b"{}")
    seen = MetricsReader(store).look()

    assert seen.unreadable == {"channels": 0, "status": 1, "verdicts": 0, "rollouts": 0}
    assert len(seen.statuses) == len(seen.channels) == 1


@pytest.mark.parametrize("name", ["looks/000004.json", "history.json"])
def test_evidence_that_a_driver_cannot_read_is_counted(store: Watched, name: str) -> None:
    key = f"rollouts/{MODEL}/{ENVIRONMENT}/1/{name}"
    store.put(key, b'{"rollout"')
    store.put(f"rollouts/{MODEL}/{ENVIRONMENT}/1/events/rollout-1-x.json", b"{}")
    store.put(f"rollouts/{MODEL}/{ENVIRONMENT}/0/{name}", b"")
    reader = MetricsReader(store)
    assert reader.look().unreadable["rollouts"] == 1
    before = store.reads
    assert reader.look().unreadable["rollouts"] == 1
    assert store.reads == before
    # It does not go away with its rollout, but with whoever mends it.
    put_channel(store, make_channel(ended=True))
    assert reader.look().unreadable["rollouts"] == 1
    store.delete(key)
    assert reader.look().unreadable["rollouts"] == 0


def test_a_store_that_is_away_leaves_the_page_with_its_old_time(store: Watched) -> None:
    moments = iter([NOW, NOW + timedelta(hours=1)])
    exporter = Exporter(MetricsReader(store, now=lambda: next(moments)), 1.0)
    assert exporter.look()
    first = exporter.text()
    store.away = True

    assert not exporter.look()
    assert exporter.text() == first
    (line,) = (line for line in first.decode().splitlines() if line.startswith(LAST_LOOK))
    assert float(line.removeprefix(LAST_LOOK)) == NOW.timestamp()


def test_it_is_ready_after_the_first_look_and_unhealthy_when_it_stands_still(
    store: Watched,
) -> None:
    clock = [0.0]
    exporter = Exporter(MetricsReader(store), 15.0, monotonic=lambda: clock[0])
    healthy, ready = exporter.checks["/healthz"], exporter.checks["/readyz"]
    assert not ready()
    exporter.look()
    assert ready()
    assert healthy()
    clock[0] = 1000.0
    assert not healthy()


def test_prometheus_reads_it_over_http(store: Watched) -> None:
    exporter = Exporter(MetricsReader(store), 1.0)
    exporter.look()
    server = serve_pages("127.0.0.1", 0, exporter, exporter.checks)
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        answer = httpx.get(f"{url}/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=")
        assert answer.content == exporter.text()
        assert httpx.get(f"{url}/readyz").status_code == 200
    finally:
        server.shutdown()
        server.server_close()


def test_an_empty_store_has_a_page(tmp_path: Path) -> None:
    text = text_of(MetricsReader(FolderStore(tmp_path / "none")).look())

    assert b"trainyard_metrics_last_look_timestamp_seconds" in text


def test_the_page_can_be_had_once(
    store: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAINYARD_STORE", str(tmp_path / "store"))
    get_settings.cache_clear()
    result = CliRunner().invoke(cli.app, ["metrics", "--once"])
    get_settings.cache_clear()

    assert result.exit_code == 0
    assert f'trainyard_channel_generation{{environment="{ENVIRONMENT}"' in result.stdout
