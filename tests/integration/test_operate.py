"""Prometheus sees what serves, and a restored store takes nothing off the air."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from tests.integration.serving.conftest import Yard
from tests.prometheus import Prometheus, prometheus
from tests.serving_world import (
    ENVIRONMENT,
    MODEL,
    PATIENCE_S,
    eventually,
    make_channel,
    make_release,
    put_channel,
)

from trainyard.care.agree import Published, Run, Served, World, disagreements
from trainyard.documents.channel import Channel
from trainyard.metrics.page import Exporter
from trainyard.metrics.reader import MetricsReader
from trainyard.releases import list_releases
from trainyard.rollout.channel_store import read_channel
from trainyard.rollout.readers.choice import open_reader
from trainyard.serving.kubernetes.guard_metrics import serve_pages
from trainyard.serving.local_host import LocalHost
from trainyard.serving.protocol import ServerStatus
from trainyard.settings import Settings
from trainyard.spec.metrics import MetricsSource

RECORDED = Path(__file__).parents[1] / "unit" / "deploy" / "pages" / "vllm.txt"

pytestmark = pytest.mark.integration


@pytest.fixture
def yard(tmp_path: Path) -> Iterator[Yard]:
    made = Yard(Settings(home=tmp_path / "home"))
    yield made
    made.end()


@pytest.fixture
def watched(yard: Yard, tmp_path: Path) -> Iterator[Prometheus]:
    """A proxy and the exporter, with a Prometheus that knows where they are."""
    proxy_port = urlsplit(yard.start_proxy()).port
    assert proxy_port is not None
    exporter = Exporter(MetricsReader(yard.store), 0.5)
    pages = serve_pages("127.0.0.1", 0, exporter, exporter.checks)
    stop = threading.Event()
    looking = threading.Thread(target=exporter.run, args=(stop,))
    looking.start()
    try:
        ports = {8080: proxy_port, 8082: int(pages.server_address[1])}
        with prometheus(tmp_path / "prometheus", ports) as running:
            yield running
    finally:
        stop.set()
        looking.join(timeout=PATIENCE_S)
        pages.shutdown()
        pages.server_close()


def only_stable(release_id: str, generation: int) -> Channel:
    return make_channel(
        stable=release_id, candidate=None, weight=0, phase=None, generation=generation
    )


def test_prometheus_finds_servers_as_they_come_and_go(yard: Yard, watched: Prometheus) -> None:
    old, new = (make_release(yard.settings, yard.store, name) for name in ("v1", "v2"))
    for release in (old, new):
        yard.serve(release.release_id, model=MODEL)
    put_channel(
        yard.store,
        make_channel(stable=old.release_id, candidate=new.release_id, weight=0, generation=3),
    )

    def series() -> set[tuple[str, ...]]:
        found = watched.query("vllm:num_requests_running")
        labels = ("environment", "model", "release", "pod")
        return {tuple(each["metric"][label] for label in labels) for each in found}

    wanted = {(ENVIRONMENT, MODEL, each.release_id, f"{each.release_id}-0") for each in (old, new)}
    eventually(lambda: series() == wanted, why="both servers are scraped")
    eventually(
        lambda: watched.value('trainyard_channel_weight_percent{track="stable"}') == 100,
        why="the store's figures are scraped",
    )
    eventually(
        lambda: watched.targets().get("proxy") == ["up"], why="the proxy's own page is scraped"
    )
    # A scrape that a busy machine keeps from being answered in time takes all figures away.
    weight = f'trainyard_proxy_weight_percent{{release="{old.release_id}"}}'
    eventually(lambda: watched.value(weight) == 100, why="the proxy's weights are scraped")
    # The rules are loaded, and none of the words that they match on is missing.
    assert "TrainyardStableUnseen" in watched.alerts()
    stable = 'trainyard_channel_release_info{track="stable"}'
    unseen = f"{stable} unless on (environment, model, release) vllm:num_requests_running"
    eventually(lambda: watched.query(unseen) == [], why="the stable release is seen")
    yard.servers[0].process.stop(0)
    eventually(lambda: watched.query(unseen), why="the stable release is unseen")


def test_the_judge_reads_real_figures_of_vllm_from_prometheus(tmp_path: Path) -> None:
    """With the files of the compose service, and a page that a real vLLM showed."""
    release, started = "adder-0123456789ab", time.time() - 100
    page = re.sub(
        r"^process_start_time_seconds .*$",
        f"process_start_time_seconds {started}",
        RECORDED.read_text(),
        flags=re.MULTILINE,
    )
    labels = {"environment": "production", "model": MODEL, "release": release}
    with (
        serving(page, {**labels, "pod": f"{release}-0"}) as port,
        prometheus(tmp_path / "prometheus", {8080: port}) as running,
    ):
        source = MetricsSource(source="prometheus", url=running.url, freshness_s=15)
        reader = open_reader(source, lambda release_id: "0.32.0")
        server = ServerStatus(
            f"{release}-0", release, "ready", "", datetime.fromtimestamp(started, UTC), 0, ""
        )
        (pod,) = eventually(lambda: reader.read("production", [server]), why="figures")

    assert pod.read_at is not None
    for name, histogram in (
        ("vllm:time_to_first_token_seconds", pod.ttft),
        ("vllm:request_time_per_output_token_seconds", pod.tpot),
    ):
        (count,) = re.findall(rf"^{name}_count{{.*}} (\S+)$", page, re.MULTILINE)
        assert histogram is not None
        assert histogram.count == float(count) > 0


@contextmanager
def serving(page: str, labels: dict[str, str]) -> Iterator[int]:
    """Show a page, and at `/-/targets` that it is there; returns the port."""

    class Pages(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = page
            if self.path == "/-/targets":
                here = f"127.0.0.1:{server.server_address[1]}"
                found = json.dumps([{"targets": [here], "labels": labels}])
            kind = "application/json" if found is not page else "text/plain; version=0.0.4"
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(found.encode())

        def log_message(self, format: str, *args: object) -> None:
            """Be quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        thread.join(timeout=PATIENCE_S)
        server.server_close()


def test_a_store_of_an_hour_ago_stops_nobody_and_verify_says_what_is_wrong(
    yard: Yard, tmp_path: Path
) -> None:
    first, second = (make_release(yard.settings, yard.store, name) for name in ("v1", "v2"))
    before = yard.serve(first.release_id, model=MODEL)
    put_channel(yard.store, only_stable(first.release_id, 3))
    url = f"{yard.start_proxy()}/{ENVIRONMENT}/{MODEL}/v1/completions"
    eventually(
        lambda: httpx.post(url, json={}, timeout=PATIENCE_S).status_code == 200,
        why="the first one serves",
    )
    # An hour ago: the copy of the store, before the second release.
    copy, root = tmp_path / "copy", yard.settings.store_root
    shutil.copytree(root, copy)
    (copy / "releases" / MODEL / f"{second.release_id}.json").unlink()
    # Since then the second one was promoted, and the first one's servers are gone.
    yard.serve(second.release_id, model=MODEL)
    put_channel(yard.store, only_stable(second.release_id, 9))
    eventually(lambda: yard.status(MODEL).channel_generation == 9, why="the route follows")
    before.process.stop(0)

    answers: list[int] = []
    stop = threading.Event()

    def clients() -> None:
        with httpx.Client(timeout=PATIENCE_S) as client:
            while not stop.wait(0.02):
                try:
                    answers.append(client.post(url, json={"tokens": 1}).status_code)
                except httpx.HTTPError:
                    answers.append(0)

    asking = threading.Thread(target=clients)
    asking.start()
    try:
        lost = tmp_path / "lost"
        root.rename(lost)
        # At once, or the guard might look while there is no store, or half of one.
        copy.rename(root)
        eventually(lambda: "restored from a copy" in yard.log, why="the guard has noticed")
        eventually(lambda: len(answers) > 50, why="clients have asked meanwhile")
        stopped = len(answers)
        yard.end_proxy()
        yard.start_proxy()
        eventually(lambda: answers[-1] == 200 and len(answers) > stopped + 20, why="it serves on")
    finally:
        stop.set()
        asking.join(timeout=PATIENCE_S)
    # While the proxy itself was away, nobody could be answered; nothing else may have failed.
    assert set(answers[:stopped]) == {200}

    servers = LocalHost(yard.settings).servers(ENVIRONMENT, MODEL)
    world = World(
        channels=(read_channel(yard.store, MODEL, ENVIRONMENT),),
        releases=tuple(
            Published(each.model, each.release_id) for each in list_releases(yard.store, MODEL)
        ),
        served={
            (ENVIRONMENT, MODEL): Served(
                {each.release_id: 1 for each in servers if each.state == "ready"},
                yard.status(MODEL).channel_generation,
            )
        },
        # Airflow's database is of yet another moment: it knows the promotion.
        runs=(
            Run(f"neuron_promote__{ENVIRONMENT}", f"promote__{second.release_id}__g8", "success"),
        ),
    )
    found = {(each.key.split("/")[0], each.kind): "" for each in disagreements(world)}
    messages = " ".join(each.message for each in disagreements(world))
    assert found == {("channels", "wrong"): "", ("releases", "missing"): ""}
    for said in (
        "the route follows generation 9",
        f"{second.release_id} has 1 ready server, but the channel gives it no role",
        f"{first.release_id} is stable and has no ready server",
        "the store is older than Airflow's database",
    ):
        assert said in messages
