"""The proxy between real clients and servers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import stat
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.integration.serving.conftest import Yard
from tests.serving_world import (
    ENVIRONMENT,
    PATIENCE_S,
    FakeServer,
    eventually,
    make_channel,
    observed,
    put_channel,
    some_id,
)

from trainyard.serving.guard_events import guard_events
from trainyard.serving.lease import FileLease
from trainyard.serving.protocol import ReleaseTraffic, RouteStatus, ServerTraffic
from trainyard.serving.records import (
    ProxyRecord,
    ServingPaths,
    choose_port,
    read_record,
    write_record,
)
from trainyard.serving.records import proxy_url as url_of

pytestmark = pytest.mark.integration


@dataclass
class Place:
    """A model of the test's own: two releases, a server of each, a channel with a living lease."""

    yard: Yard
    model: str
    old: FakeServer
    new: FakeServer
    generation: int = 1

    @property
    def old_id(self) -> str:
        return self.old.record.release_id

    @property
    def new_id(self) -> str:
        return self.new.record.release_id

    @property
    def url(self) -> str:
        return f"{url_of(self.yard.settings)}/{ENVIRONMENT}/{self.model}/v1"

    def wish(self, weight: int, **changes: Any) -> RouteStatus:
        """Change the channel, and return the status once the proxy follows."""
        self.generation += 1
        values = {"stable": self.old_id, "candidate": self.new_id, "weight": weight, **changes}
        channel = make_channel(model=self.model, generation=self.generation, **values)
        put_channel(self.yard.store, channel)
        return eventually(self._followed, why="the proxy follows the channel")

    def _followed(self) -> RouteStatus | None:
        status = self.yard.router.status(ENVIRONMENT, self.model)
        return status if status and status.channel_generation == self.generation else None

    def traffic(self) -> tuple[ReleaseTraffic, ReleaseTraffic]:
        """Return the counts of the old and the new release once no request is under way.

        A client has its answer a moment before the proxy has counted it.
        """
        found = eventually(self._resting, why="no request is under way").traffic
        old, new = (replace(found[name], servers={}) for name in (self.old_id, self.new_id))
        return old, new

    def servers(self) -> dict[str, ServerTraffic]:
        """Return the counts of all servers by name once no request is under way."""
        found = eventually(self._resting, why="no request is under way").traffic
        return {name: one for each in found.values() for name, one in each.servers.items()}

    def _resting(self) -> RouteStatus | None:
        status = self.yard.status(self.model)
        return None if any(each.in_flight for each in status.traffic.values()) else status

    def lease(self) -> FileLease:
        return FileLease(self.yard.settings)

    def told(self, server: FakeServer) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{server.url}/v1/told", timeout=PATIENCE_S).json()
        return found


def make_place(yard: Yard, model: str) -> Place:
    with ThreadPoolExecutor() as pool:
        names = [some_id("old", model), some_id("new", model)]
        old, new = pool.map(lambda name: yard.serve(name, model=model), names)
    FileLease(yard.settings).renew(ENVIRONMENT, model, holder="test", duration_s=300)
    return Place(yard, model, old, new)


@pytest.fixture
def place(shared_yard: Yard, request: pytest.FixtureRequest) -> Iterator[Place]:
    number = len(shared_yard.servers)
    made = make_place(shared_yard, f"model-{number}")
    yield made
    for server in (made.old, made.new):
        server.process.stop(0)


def complete(url: str, client: httpx.Client | None = None, **asked: Any) -> httpx.Response:
    headers = asked.pop("headers", None)
    post = client.post if client else httpx.post
    return post(f"{url}/completions", json=asked, headers=headers, timeout=PATIENCE_S)


def stream(url: str, **asked: Any) -> AbstractContextManager[httpx.Response]:
    """Ask for a stream."""
    body = {"stream": True, **asked}
    return httpx.stream("POST", f"{url}/completions", json=body, timeout=PATIENCE_S)


def sent(requests: int, *, errors: int = 0, unanswered: int = 0, refused: int = 0) -> ServerTraffic:
    """Return the counts of a server whose requests have all ended."""
    return ServerTraffic(requests, errors, requests, unanswered, refused)


def go_on(server: FakeServer) -> None:
    """Let a server make the next token of a stream that waits to be told."""
    httpx.post(f"{server.url}/go-on", timeout=PATIENCE_S).raise_for_status()


def takes_connections(url: str) -> bool:
    """Tell whether somebody listens there."""
    with socket.socket() as client:
        return client.connect_ex((httpx.URL(url).host, httpx.URL(url).port)) == 0


def test_traffic_is_divided_by_weight_and_every_answer_says_by_whom(place: Place) -> None:
    place.wish(10)
    with httpx.Client() as client:
        answers = [complete(place.url, client) for _ in range(200)]
    assert {answer.status_code for answer in answers} == {200}
    by_release = Counter(answer.headers["x-trainyard-release"] for answer in answers)
    assert abs(by_release[place.new_id] - 20) <= 2
    for server in (place.old, place.new):
        assert place.told(server)["served"] == by_release[server.record.release_id]
    old, new = place.traffic()
    assert (old.arrivals, new.arrivals) == (by_release[place.old_id], by_release[place.new_id])
    assert (old.errors, new.errors, old.in_flight, new.in_flight) == (0, 0, 0, 0)


def test_a_client_may_be_idle_for_longer_than_clients_keep_connections(place: Place) -> None:
    """Else a request may meet a connection that is just being closed (httpx keeps them for 5 s)."""
    place.wish(0)
    limits = httpx.Limits(keepalive_expiry=None)
    with httpx.Client(trust_env=False, limits=limits) as client:
        connections = []
        for pause_s in (0.0, 5.5):
            time.sleep(pause_s)
            answer = complete(place.url, client)
            assert answer.status_code == 200
            connections.append(answer.extensions["network_stream"].get_extra_info("client_addr"))
    assert connections[0] == connections[1]


def test_a_stream_comes_piece_by_piece_in_order(place: Place) -> None:
    place.wish(0)
    lines = []
    with stream(place.url, tokens=5, told=True) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in filter(None, response.iter_lines()):
            lines.append(line.removeprefix("data: "))
            # Each piece is here before the server makes the next one.
            go_on(place.old)
    tokens = [json.loads(line) for line in lines[:-1]]
    assert [token["token"] for token in tokens] == [0, 1, 2, 3, 4]
    assert lines[-1] == "[DONE]"


def test_requests_and_answers_are_passed_on_as_they_are(place: Place) -> None:
    place.wish(0)
    body = b"x" * 300_000
    answer = httpx.post(
        f"{place.url}/echo/a%20b?c=%2F&d",
        content=body,
        headers={"x-own": "1", "authorization": "Bearer t", "connection": "x-own"},
        timeout=PATIENCE_S,
    )
    told = answer.json()
    assert (told["target"], told["query"], told["length"]) == (
        "/v1/echo/a%20b",
        "c=%2F&d",
        len(body),
    )
    assert told["headers"]["authorization"] == "Bearer t"
    assert told["headers"]["host"] == f"127.0.0.1:{place.old.record.port}"
    assert answer.headers.get_list("date").__len__() == 1
    assert answer.headers.get_list("server") == ["uvicorn"]


def test_a_chunked_upload_arrives_whole(place: Place) -> None:
    place.wish(0)
    pieces = (b"y" * 1000 for _ in range(50))
    answer = httpx.put(f"{place.url}/echo/", content=pieces, timeout=PATIENCE_S)
    assert answer.json()["length"] == 50_000


def test_a_client_that_goes_away_ends_its_request_at_the_server(place: Place) -> None:
    place.wish(0)
    with stream(place.url, tokens=1000, told=True) as response:
        lines = response.iter_lines()
        next(lines)
        assert place.told(place.old)["running"] == 1
    eventually(lambda: place.told(place.old)["aborted"] == 1, why="the server stops")
    old, _ = place.traffic()
    assert (old.arrivals, old.errors) == (1, 0)
    assert place.servers() == {place.old.record.name: sent(1)}


def test_a_client_that_goes_away_before_the_answer_is_no_error_either(place: Place) -> None:
    place.wish(0)

    async def leave() -> None:
        async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
            asked = {"tokens": 1, "delay_s": 3600}
            answer = asyncio.create_task(client.post(f"{place.url}/completions", json=asked))
            await asyncio.to_thread(
                eventually, lambda: place.told(place.old)["running"] == 1, why="the server works"
            )
            answer.cancel()
            with pytest.raises(asyncio.CancelledError):
                await answer

    asyncio.run(leave())
    assert place.traffic()[0] == ReleaseTraffic(1, 0, 0)
    assert place.servers() == {place.old.record.name: sent(1, unanswered=1)}


def test_the_head_of_a_stream_is_no_answer(place: Place) -> None:
    """Servers send it before they have a token, so one that hangs sends it as well."""
    place.wish(0)
    with stream(place.url, fault="hang") as response:
        assert response.status_code == 200
    assert place.servers() == {place.old.record.name: sent(1, unanswered=1)}


def test_errors_are_counted_where_they_happen(place: Place) -> None:
    place.wish(50)
    answers = [complete(place.url, fault="500") for _ in range(4)]
    assert [answer.status_code for answer in answers] == [500] * 4
    assert all("asked for" in answer.text for answer in answers)
    old, new = place.traffic()
    assert (old.errors, new.errors) == (2, 2)
    assert (old.arrivals, new.arrivals) == (2, 2)
    assert place.servers() == {
        place.old.record.name: sent(2, errors=2),
        place.new.record.name: sent(2, errors=2),
    }


def test_a_stream_that_breaks_off_is_an_error_and_not_a_short_answer(place: Place) -> None:
    place.wish(0)
    with pytest.raises(httpx.RemoteProtocolError):
        complete(place.url, stream=True, tokens=3, fault="cut")
    assert place.traffic()[0] == ReleaseTraffic(1, 1, 0)


def test_what_a_server_loses_at_once_is_its_own(place: Place) -> None:
    def lost() -> int:
        return place.yard.status(place.model).traffic[place.old_id].errors

    twin = place.yard.serve(place.old_id, 1, model=place.model)
    place.wish(0)
    with contextlib.ExitStack() as stack:
        streams = [
            stack.enter_context(stream(place.url, tokens=2000, told=True)).iter_lines()
            for _ in range(6)
        ]
        for lines in streams:
            next(lines)
        twin.process.stop(0)
        eventually(lambda: lost() == 3, why="its requests have ended")
    # The clients of the other server have gone away by now, which is nobody's error.
    assert place.traffic()[0] == ReleaseTraffic(6, 3, 0)
    assert place.servers() == {
        place.old.record.name: sent(3),
        twin.record.name: sent(3, errors=3),
    }


def test_bad_requests_of_clients_are_no_errors_of_the_release(place: Place) -> None:
    place.wish(0)
    assert httpx.get(f"{place.url}/nothing", timeout=PATIENCE_S).status_code == 404
    assert place.traffic()[0] == ReleaseTraffic(1, 0, 0)
    assert place.servers() == {place.old.record.name: sent(1, refused=1)}


def test_a_pinned_request_reaches_its_track_and_is_not_counted(place: Place) -> None:
    place.wish(0)
    for track, release_id in (("candidate", place.new_id), ("stable", place.old_id)):
        answer = complete(place.url, headers={"x-trainyard-track": track})
        assert answer.headers["x-trainyard-release"] == release_id
    assert place.traffic() == (ReleaseTraffic(0, 0, 0), ReleaseTraffic(0, 0, 0))
    assert place.servers() == {}
    refused = complete(place.url, headers={"x-trainyard-track": "best"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "bad_track")


def test_a_server_that_is_gone_costs_no_client_its_answer(place: Place) -> None:
    twin = place.yard.serve(place.old_id, 1, model=place.model)
    place.wish(0)
    eventually(lambda: ready(place.yard, place.model) == 3, why="all servers in the route")
    twin.process.stop(0)
    with httpx.Client() as client:
        assert {complete(place.url, client).status_code for _ in range(6)} == {200}


def ready(yard: Yard, model: str) -> int:
    paths = ServingPaths.of(yard.settings)
    names = paths.observed(ENVIRONMENT, "x").parent.glob(f"{model}-*.json")
    return len(list(names))


def test_a_refused_connection_is_retried_and_counts_against_the_first_choice(place: Place) -> None:
    # A record that still says ready, for a process that lives and does not listen.
    nobody = observed(
        place.new_id, 0, process=place.new.process, model=place.model, port=choose_port()
    )
    write_record(ServingPaths.of(place.yard.settings).observed(ENVIRONMENT, nobody.name), nobody)
    place.wish(50)
    answers = [complete(place.url) for _ in range(8)]
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.headers["x-trainyard-release"] for answer in answers} == {place.old_id}
    old, new = place.traffic()
    assert (old.arrivals, old.errors) == (4, 0)
    assert (new.arrivals, new.errors) == (4, 4)
    assert place.servers() == {
        place.old.record.name: sent(4),
        nobody.name: sent(4, errors=4),
    }


def test_connections_that_fail_in_a_row_blow_the_fuse(place: Place) -> None:
    nobody = observed(
        place.new_id, 0, process=place.new.process, model=place.model, port=choose_port()
    )
    write_record(ServingPaths.of(place.yard.settings).observed(ENVIRONMENT, nobody.name), nobody)
    place.wish(50)
    for _ in range(12):
        assert complete(place.url).status_code == 200
    status = eventually(
        lambda: (s := place.yard.status(place.model)).guard == "fuse" and s, why="the fuse"
    )
    assert status
    assert status.weights == {place.old_id: 100, place.new_id: 0}
    event = eventually(
        lambda: guard_events(place.yard.store, place.model, ENVIRONMENT, 1), why="the event"
    )[0]
    assert (event.event, event.release_id) == ("fuse", place.new_id)


def test_without_a_lease_the_candidate_loses_its_traffic(place: Place) -> None:
    place.wish(50)
    place.lease().release(ENVIRONMENT, place.model, holder="test")
    status = eventually(
        lambda: (s := place.yard.status(place.model)).guard == "lease_expired" and s,
        why="the guard acts",
    )
    assert status
    assert status.weights == {place.old_id: 100, place.new_id: 0}
    for _ in range(10):
        assert complete(place.url).headers["x-trainyard-release"] == place.old_id


def test_no_server_is_said_so_that_clients_try_again(place: Place) -> None:
    place.old.process.stop(0)
    place.new.process.stop(0)
    place.wish(0)
    answer = complete(place.url)
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0
    assert answer.json()["error"]["code"] == "no_server"
    assert place.traffic()[0] == ReleaseTraffic(1, 1, 0)
    # There was no server to blame.
    assert place.servers() == {}


@pytest.mark.parametrize(
    "path",
    ["/", "/x", "/nowhere/adder/v1/completions", "/staging/nothing/v1/completions", "/-/secret"],
)
def test_unknown_paths_are_not_found(shared_yard: Yard, path: str) -> None:
    answer = httpx.get(f"{url_of(shared_yard.settings)}{path}", timeout=PATIENCE_S)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


def test_pages_of_a_server_outside_v1_stay_closed(place: Place) -> None:
    place.wish(0)
    base = place.url.removesuffix("/v1")
    for path in ("/metrics", "/health", "/v1/%2e%2e/metrics"):
        assert httpx.get(f"{base}{path}", timeout=PATIENCE_S).status_code == 404


def test_metrics_tell_what_clients_saw(place: Place) -> None:
    place.wish(0)
    for _ in range(3):
        complete(place.url, stream=True, tokens=2)
    text = httpx.get(f"{url_of(place.yard.settings)}/-/metrics", timeout=PATIENCE_S).text
    labels = f'environment="{ENVIRONMENT}",model="{place.model}"'
    old = f'{labels},release="{place.old_id}"'
    own = [line for line in text.splitlines() if f'model="{place.model}"' in line]
    for line in (
        f'trainyard_proxy_requests_total{{{labels},outcome="ok",release="{place.old_id}"}} 3.0',
        f"trainyard_proxy_time_to_first_token_seconds_count{{{old}}} 3.0",
        f"trainyard_proxy_weight_percent{{{old}}} 100.0",
        f'trainyard_proxy_guard_state{{{labels},state="following"}} 1.0',
    ):
        assert line in own


def test_many_streams_at_once_keep_their_own_pieces(place: Place) -> None:
    place.wish(50)

    async def one(client: httpx.AsyncClient, tokens: int) -> list[int]:
        asked = {"stream": True, "tokens": tokens, "delay_s": 0.005}
        async with client.stream("POST", f"{place.url}/completions", json=asked) as response:
            lines = [line async for line in response.aiter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: "))["token"] for line in lines[:-1]]

    async def all_of_them() -> list[list[int]]:
        async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
            return await asyncio.gather(*(one(client, 5 + n) for n in range(40)))

    found = asyncio.run(all_of_them())
    assert found == [list(range(5 + n)) for n in range(40)]
    old, new = place.traffic()
    assert (old.arrivals, new.arrivals) == (20, 20)


def test_the_status_is_on_a_socket_that_only_the_user_can_reach(shared_yard: Yard) -> None:
    record = read_record(ServingPaths.of(shared_yard.settings).proxy, ProxyRecord)
    assert record is not None
    mode = Path(record.socket).stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600
    assert shared_yard.router.status(ENVIRONMENT, "nothing") is None


def test_after_kill_9_the_proxy_has_its_port_weights_and_fuse_again(yard: Yard) -> None:
    url = yard.start_proxy()
    place = make_place(yard, "adder")
    place.wish(25)
    before = yard.status("adder")
    yard.end_proxy(signal.SIGKILL)
    assert yard.router.status(ENVIRONMENT, "adder") is None
    assert yard.start_proxy() == url
    after = yard.status("adder")
    assert after.weights == before.weights == {place.old_id: 75, place.new_id: 25}
    assert after.epoch != before.epoch

    place.new.process.stop(0)
    eventually(lambda: yard.status("adder").guard == "fuse", why="the fuse")
    eventually(lambda: guard_events(yard.store, "adder", ENVIRONMENT, 1), why="the event")
    yard.end_proxy(signal.SIGKILL)
    yard.serve(place.new_id, model="adder")
    assert yard.start_proxy() == url
    assert yard.status("adder").guard == "fuse"
    assert yard.status("adder").weights[place.new_id] == 0


def test_sigterm_lets_streams_end_and_leaves_no_socket(yard: Yard) -> None:
    yard.start_proxy()
    place = make_place(yard, "adder")
    place.wish(0)
    with stream(place.url, tokens=3, told=True) as response:
        lines = response.iter_lines()
        next(lines)
        assert yard.proxy is not None
        yard.proxy.send_signal(signal.SIGTERM)
        eventually(lambda: not takes_connections(place.url), why="it begins to end")
        for _ in range(2):
            go_on(place.old)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert yard.proxy.wait(timeout=PATIENCE_S) == 0
    assert not (yard.settings.home / "run" / "proxy.sock").exists()


def test_there_is_one_proxy_for_a_home(yard: Yard) -> None:
    yard.start_proxy()
    first = yard.proxy
    yard.proxy = None
    with pytest.raises(AssertionError, match=r"Another proxy already runs"):
        # The second one ends at once and says why.
        eventually(lambda: start_second(yard), why="the second one ends")
    yard.proxy = first


def start_second(yard: Yard) -> None:
    yard.start_proxy()
    assert yard.proxy is not None
    yard.proxy.wait(timeout=PATIENCE_S)
    raise AssertionError(yard.log)


def test_a_taken_port_is_left_for_another_one_only_if_nobody_set_it(yard: Yard) -> None:
    port = choose_port()
    paths = ServingPaths.of(yard.settings)
    write_record(paths.proxy, ProxyRecord(port=port, socket="/nowhere", pid=1, epoch="before"))
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        url = yard.start_proxy()
    assert url != f"http://127.0.0.1:{port}"
    assert "clients need the new URL" in yard.log
