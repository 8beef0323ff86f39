"""The reader against a real Prometheus that scrapes servers' pages, good ones and bad ones.

Debian's package `prometheus` has what it takes; without it these tests are skipped. One Prometheus
serves all of them: it scrapes one server for each thing that can go wrong.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import httpx
import pytest
import yaml
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from tests.rollout_world import release_id

from trainyard.documents.evidence import JudgeSpec, default_metrics
from trainyard.documents.look import PodCounters, RouteCounters, Snapshot
from trainyard.rollout.judge.history import learn
from trainyard.rollout.readers.prometheus import PrometheusReader
from trainyard.rollout.sight import unseen
from trainyard.rollout.slices import blocks_from_snapshots
from trainyard.serving.protocol import ServerStatus
from trainyard.serving.records import choose_port
from trainyard.spec.metrics import MetricsSource

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        shutil.which("prometheus") is None or shutil.which("promtool") is None,
        reason="Debian's package prometheus is not installed",
    ),
]

OLD, NEW = release_id("old"), release_id("new")
UNREADABLE = ("gone", "missing", "nan", "409", "503", "garbage")
FAULTS = ("frozen", "reset", *UNREADABLE)
PODS = {f"{OLD}-0": OLD, f"{OLD}-1": OLD, f"{NEW}-good": NEW} | {f"{NEW}-{f}": NEW for f in FAULTS}
FRESHNESS_S = 6.0
"""Six scrapes: a machine that is busy may miss some."""
PAST_MINUTES = 90
TTFT = "vllm:time_to_first_token_seconds"
TPOT = "vllm:request_time_per_output_token_seconds"


class FakeServer:
    """What a vLLM server shows of itself, with a switch for what is wrong with it."""

    def __init__(self) -> None:
        self.fault = ""
        self.began = time.time()
        self._frozen = b""
        self._start()

    def _start(self) -> None:
        self.registry = CollectorRegistry()
        label = ("engine", "model_name")
        self._ttft = Histogram(TTFT, "h", label, buckets=(0.1, 0.5, 2.5), registry=self.registry)
        self._tpot = Histogram(TPOT, "h", label, buckets=(0.01, 0.1), registry=self.registry)
        self._done = Counter(
            "vllm:request_success", "h", (*label, "finished_reason"), registry=self.registry
        )
        started = Gauge("process_start_time_seconds", "h", registry=self.registry)
        started.set(time.time())

    def serve(self, requests: int) -> None:
        """Count requests, half of them by each of two engines."""
        for index in range(requests):
            labels = (str(index % 2), "adder")
            self._ttft.labels(*labels).observe(0.05)
            self._tpot.labels(*labels).observe(0.02)
            self._done.labels(*labels, "stop").inc()

    def restart(self) -> None:
        """Begin anew, as a process that crashed."""
        self._start()

    def page(self) -> tuple[int, bytes]:
        """Return status and text of `/metrics`."""
        text = generate_latest(self.registry)
        if self.fault == "frozen":
            self._frozen = self._frozen or text
            return 200, self._frozen
        if self.fault == "missing":
            return 200, b"# TYPE up_and_well gauge\nup_and_well 1\n"
        if self.fault == "nan":
            lines = text.decode().splitlines()
            spoilt = [
                f"{line.rpartition(' ')[0]} NaN" if line.startswith(f"{TTFT}_sum") else line
                for line in lines
            ]
            return 200, ("\n".join(spoilt) + "\n").encode()
        if self.fault == "garbage":
            return 200, b"<html>this is no page of metrics</html>"
        return (int(self.fault) if self.fault.isdigit() else 200), text


@dataclass
class Yard:
    """Servers, and the Prometheus that scrapes them."""

    url: str
    servers: dict[str, FakeServer]
    process: subprocess.Popen[bytes]
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC) - timedelta(days=1))

    def status(self, *names: str) -> list[ServerStatus]:
        """Return servers as a host would."""
        return [
            ServerStatus(name, PODS[name], "ready", "", self.started_at, 0, "") for name in names
        ]

    def reader(self, *, skew_s: float = 0.0) -> PrometheusReader:
        """Return a reader whose clock is off by so much."""
        source = MetricsSource(
            source="prometheus", url=self.url, freshness_s=FRESHNESS_S, timeout_s=30.0
        )
        return PrometheusReader(
            source,
            version_of=lambda _: "0.13.0",
            now=lambda: datetime.now(UTC) + timedelta(seconds=skew_s),
        )

    def read(self, *names: str) -> dict[str, PodCounters]:
        """Read servers."""
        found = self.reader().read("production", self.status(*names))
        return {pod.pod: pod for pod in found}

    def wait_for(self, counts: Mapping[str, int | None]) -> dict[str, PodCounters]:
        """Wait until just these requests of the servers are known; None: until one is missing."""
        end = time.monotonic() + 120
        found: dict[str, PodCounters] = {}
        while time.monotonic() < end:
            found = self.read(*counts)
            known = {name: pod.ttft.count for name, pod in found.items() if pod.ttft}
            if known == {name: count for name, count in counts.items() if count is not None}:
                return found
            time.sleep(0.2)
        raise AssertionError(f"not {counts}, but {found}")


def past(now_s: int) -> str:
    """Return 90 minutes of two servers of `old`, of which one is 20 % slower, as OpenMetrics."""
    lines: list[str] = []
    series: dict[str, list[str]] = {}
    for minute in range(PAST_MINUTES):
        at = now_s - 60 * (PAST_MINUTES - minute)
        for number, slower in ((0, 1.0), (1, 1.2)):
            labels = f'pod="{OLD}-{number}",release="{OLD}",node="n{number}",engine="0"'
            n = 300 * minute
            for name, mean in ((TTFT, 0.05), (TPOT, 0.02)):
                series.setdefault(f"{name}_count", []).append(f"{{{labels}}} {n} {at}")
                total = n * mean * slower
                series.setdefault(f"{name}_sum", []).append(f"{{{labels}}} {total} {at}")
            for edge in ("0.1", "0.5", "2.5", "+Inf"):
                row = f'{{{labels},le="{edge}"}} {n} {at}'
                series.setdefault(f"{TTFT}_bucket", []).append(row)
    for name, rows in series.items():
        # As gauges, so that each series may have the name that scraping would give it.
        lines.append(f"# TYPE {name} gauge")
        lines.extend(f"{name}{row}" for row in rows)
    return "\n".join([*lines, "# EOF", ""])


@pytest.fixture(scope="module")
def yard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Yard]:
    """A Prometheus that scrapes every second, with 90 minutes of past."""
    folder = tmp_path_factory.mktemp("prometheus")
    servers = {name: FakeServer() for name in PODS}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.strip("/").partition("/")[0]
            if servers[name].fault == "gone":
                self.close_connection = True
                return
            status, text = servers[name].page()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: object) -> None:
            """Print nothing."""

    pages = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=pages.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    port = choose_port()
    process = start(folder, port, pages.server_port)
    try:
        yard = Yard(f"http://127.0.0.1:{port}", servers, process)
        wait_until_ready(yard, folder)
        yield yard
    finally:
        process.kill()
        process.wait()
        pages.shutdown()
        pages.server_close()
        thread.join()


def start(folder: Path, port: int, pages_port: int) -> subprocess.Popen[bytes]:
    jobs = [
        {
            "job_name": name,
            "metrics_path": f"/{name}/metrics",
            "static_configs": [
                {
                    "targets": [f"127.0.0.1:{pages_port}"],
                    "labels": {"pod": name, "release": release, "node": f"node-of-{name}"},
                }
            ],
        }
        for name, release in PODS.items()
    ]
    config = {"global": {"scrape_interval": "1s", "scrape_timeout": "1s"}}
    (folder / "prometheus.yml").write_text(yaml.safe_dump({**config, "scrape_configs": jobs}))
    text = folder / "past.txt"
    text.write_text(past(int(time.time())))
    subprocess.run(
        ["promtool", "tsdb", "create-blocks-from", "openmetrics", str(text), str(folder / "data")],
        check=True,
        capture_output=True,
        timeout=240,
    )
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
            env={**os.environ, "GOMAXPROCS": "1"},
        )


def wait_until_ready(yard: Yard, folder: Path) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        try:
            if httpx.get(f"{yard.url}/-/ready", timeout=2.0, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        assert yard.process.poll() is None, (folder / "log").read_text()
        time.sleep(0.1)
    raise AssertionError((folder / "log").read_text())


@pytest.fixture(scope="module")
def faulty(yard: Yard) -> tuple[Yard, dict[str, PodCounters], dict[str, PodCounters]]:
    """What was read while all was well, and after each server got its fault."""
    for server in yard.servers.values():
        server.serve(100)
    before = yard.wait_for(dict.fromkeys(PODS, 100))
    for fault in FAULTS:
        yard.servers[f"{NEW}-{fault}"].fault = fault
    yard.servers[f"{NEW}-frozen"].page()
    yard.servers[f"{NEW}-reset"].restart()
    for server in yard.servers.values():
        server.serve(40)
    unreadable = {f"{NEW}-{fault}": None for fault in UNREADABLE}
    readable = {f"{NEW}-frozen": 100, f"{NEW}-reset": 40}
    return yard, before, yard.wait_for({**dict.fromkeys(PODS, 140), **readable, **unreadable})


def look(at: datetime, pods: Sequence[PodCounters], arrivals: int) -> Snapshot:
    counters = {"arrivals": arrivals, "errors": 0, "in_flight": 0}
    route = RouteCounters.model_validate(
        {"epoch": "1", "weights": {OLD: 50, NEW: 50}, "releases": {OLD: counters, NEW: counters}}
    )
    return Snapshot(at=at, phase="holding", step_index=0, pods=tuple(pods), route=route)


def slice_of(
    before: dict[str, PodCounters], after: dict[str, PodCounters], name: str
) -> tuple[Snapshot, Snapshot]:
    """Return two looks at one server, which was sent 40 requests in between."""
    now = datetime.now(UTC)
    pods = [[one[name]] if name in one else [] for one in (before, after)]
    return look(now - timedelta(seconds=30), pods[0], 100), look(now, pods[1], 140)


def test_while_all_is_well_everything_is_read(
    faulty: tuple[Yard, dict[str, PodCounters], dict[str, PodCounters]],
) -> None:
    _, before, after = faulty
    assert set(before) == set(PODS)
    pod = before[f"{NEW}-good"]
    assert pod.ttft is not None
    assert pod.ttft.buckets == {"0.1": 100, "0.5": 100, "2.5": 100, "+Inf": 100}
    assert pod.ttft.total == pytest.approx(5.0)
    assert pod.tpot is not None
    assert (pod.tpot.count, pod.node) == (100, f"node-of-{NEW}-good")
    shots = slice_of(before, after, f"{NEW}-good")
    assert unseen(shots[:1], shots[1], NEW, [server(f"{NEW}-good")]) == ""


@pytest.mark.parametrize("fault", UNREADABLE)
def test_what_cannot_be_read_is_missing_never_zero(
    faulty: tuple[Yard, dict[str, PodCounters], dict[str, PodCounters]], fault: str
) -> None:
    _, before, after = faulty
    name = f"{NEW}-{fault}"
    assert name in before
    assert name not in after


@pytest.mark.parametrize("fault", FAULTS)
def test_no_fault_leaves_a_row_or_sight(
    faulty: tuple[Yard, dict[str, PodCounters], dict[str, PodCounters]], fault: str
) -> None:
    _, before, after = faulty
    name = f"{NEW}-{fault}"
    shots = slice_of(before, after, name)
    assert unseen(shots[:1], shots[1], NEW, [server(name)]) != ""
    rows = blocks_from_snapshots(
        shots, exposed_since=shots[0].at - timedelta(seconds=60), candidate=NEW, stable=OLD
    )
    assert [row for row in rows if row.pod == name] == []


def test_a_server_that_starts_anew_counts_again_from_then_on(
    faulty: tuple[Yard, dict[str, PodCounters], dict[str, PodCounters]],
) -> None:
    yard, before, after = faulty
    name = f"{NEW}-reset"
    old, new = before[name], after[name]
    assert new.ttft is not None
    assert new.ttft.count == 40
    assert old.process_started_s != new.process_started_s
    yard.servers[name].serve(30)
    later = yard.wait_for({name: 70})
    shots = slice_of({name: new}, later, name)
    assert unseen(shots[:1], shots[1], NEW, [server(name)]) == ""


@pytest.mark.parametrize("skew_s", [-3600.0, 3600.0])
def test_a_clock_that_jumps_makes_everything_missing(
    faulty: tuple[Yard, dict[str, PodCounters], dict[str, PodCounters]], skew_s: float
) -> None:
    yard, _, _ = faulty
    names = [f"{OLD}-0", f"{NEW}-good"]
    yard.wait_for(dict.fromkeys(names, 140))
    assert yard.reader(skew_s=skew_s).read("production", yard.status(*names)) == ()


def test_the_past_of_stable_is_remembered_and_teaches_the_judge(yard: Yard) -> None:
    names = [f"{OLD}-0", f"{OLD}-1"]
    now = datetime.now(UTC)
    moments = yard.reader().history("production", yard.status(*names), until=now)
    assert moments is not None
    both = [at for at, pods in moments if len(pods) == 2]
    assert (both[-1] - both[0]).total_seconds() > 60 * (PAST_MINUTES - 5)
    assert {one.ttft is not None for _, pods in moments for one in pods} == {True}
    shots = [
        Snapshot(at=at, phase="idle", step_index=0, pods=pods, route=None) for at, pods in moments
    ]
    rows = blocks_from_snapshots(shots, exposed_since=now, candidate=NEW, stable=OLD)
    assert {row.weight_candidate for row in rows} == {0}
    spec = JudgeSpec(metrics=default_metrics(), max_duration_s=3600.0)
    learned = {metric.name: metric.covariance for metric in learn(rows, spec).metrics}
    assert learned["ttft"] is not None
    # One of two servers is 20 % slower for good; the default says 3 %.
    assert learned["ttft"].sb2 > 10 * spec.covariance.sb2


def test_a_prometheus_that_is_killed_is_missing(yard: Yard) -> None:
    yard.process.kill()
    yard.process.wait()
    assert yard.read(*PODS) == {}
    status = yard.status(f"{OLD}-0")
    assert yard.reader().history("production", status, until=datetime.now(UTC)) is None


def server(name: str) -> ServerStatus:
    return ServerStatus(name, PODS[name], "ready", "", None, 0, "")
