"""Who got the requests, from Envoy's pages and from our proxies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from pydantic import TypeAdapter
from tests.cluster_world import NAME, PLACE, accept, follow, place, put_pod, put_route
from tests.fake_cluster import NAMESPACE_NAME as NS
from tests.fake_cluster import FakeCluster, Fault
from tests.serving_world import ENVIRONMENT, MODEL, NEW, OLD, make_channel

from trainyard.kubernetes.kinds import HTTP_ROUTE, NAMESPACE, POD
from trainyard.serving.guard import FIRST_ANSWERS, ReleaseHealth, Wish
from trainyard.serving.kubernetes.arrivals import (
    Counts,
    DataPlaneSight,
    FuseCounts,
    ProxyAnswer,
    gateway_sight,
    parse_endpoints,
    port_of,
    proxies_sight,
    rule_cluster,
    traffic_of,
)
from trainyard.serving.kubernetes.route import new_route
from trainyard.serving.kubernetes.route_status import KubernetesRouter
from trainyard.serving.protocol import ReleaseTraffic, RouteStatus, ServerTraffic

CLUSTER = f"httproute/{NS}/{NAME}/rule/2"


def endpoint(where: str, cluster: str = CLUSTER, **figures: int) -> str:
    """Return Envoy's lines about one endpoint."""
    labels = f'envoy_cluster_name="{cluster}",envoy_endpoint_address="{where}"'
    return "".join(
        f"# TYPE envoy_cluster_endpoint_{name} counter\n"
        f"envoy_cluster_endpoint_{name}{{{labels}}} {value}\n"
        for name, value in figures.items()
    )


def pod(release_id: str, ip: str, uid: str = "") -> dict[str, Any]:
    return {
        "metadata": {
            "name": f"pod-{ip[-1]}",
            "uid": uid or ip,
            "labels": {"trainyard.dev/release": release_id},
        },
        "status": {"podIP": ip},
    }


# --- Envoy's pages --------------------------------------------------------------------------------


def test_only_the_rule_that_splits_is_counted() -> None:
    page = (
        endpoint("10.0.0.1:8000", rq_total=90, rq_success=80, rq_error=3, rq_active=7)
        + endpoint("10.0.0.1:8000", f"{CLUSTER}/backend/0", rq_total=1)
        + endpoint("10.0.0.1:8000", f"{CLUSTER}0", rq_total=1000)
        + endpoint("10.0.0.1:8000", f"httproute/{NS}/{NAME}/rule/1", rq_total=1000)
        + 'envoy_cluster_upstream_rq_total{envoy_cluster_name="x"} 5\n'
    )
    assert parse_endpoints(page, CLUSTER) == {"10.0.0.1:8000": Counts(91, 80, 3, 7, 0)}


def test_the_rule_is_found_where_it_is_now() -> None:
    route = new_route(MODEL, ENVIRONMENT, PLACE)
    assert rule_cluster(route) == CLUSTER
    route["spec"]["rules"].insert(0, {"name": "docs"})
    assert rule_cluster(route).endswith("/rule/3")


def test_counts_of_all_gateways_are_added_by_server_and_release() -> None:
    page = (
        endpoint("10.0.0.1:8000", rq_total=10, rq_error=1, rq_success=9)
        + endpoint("10.0.0.2:8000", rq_total=20, rq_success=17, rq_active=1)
        + endpoint("[fd00::3]:8000", rq_total=5, rq_success=5)
        + endpoint("10.0.0.9:8000", rq_total=1000)
    )
    servers = [pod(OLD, "10.0.0.1"), pod(OLD, "10.0.0.2"), pod(NEW, "fd00::3")]
    sight = gateway_sight({"envoy-1": page, "envoy-2": page}, servers, CLUSTER)
    assert sight.traffic == {
        OLD: ReleaseTraffic(
            60,
            2,
            2,
            {"pod-1": ServerTraffic(20, 2, 20, 0), "pod-2": ServerTraffic(38, 0, 40, 4)},
        ),
        NEW: ReleaseTraffic(10, 0, 0, {"pod-3": ServerTraffic(10, 0, 10, 0)}),
    }
    assert sight.counts == {
        OLD: Counts(total=60, error=2, success=52, active=2),
        NEW: Counts(total=10, success=10),
    }


def test_failed_connections_are_arrivals_and_errors() -> None:
    served = Counts(total=100, success=97, error=1, active=2)
    dead = Counts(error=5, connect_failures=5)
    assert traffic_of({"a": served, "b": dead}) == ReleaseTraffic(
        105, 6, 2, {"a": ServerTraffic(98, 1, 100, 0), "b": ServerTraffic(5, 5, 5, 0)}
    )


def test_envoy_tells_who_left_before_an_answer_and_not_who_was_refused() -> None:
    hung = Counts(total=100, success=60, error=3, active=2)
    assert traffic_of({"a": hung}).servers == {"a": ServerTraffic(98, 3, 100, 35, None)}


def test_what_one_proxy_does_not_count_nobody_knows() -> None:
    def told(**figures: int) -> ProxyAnswer:
        servers = {"a": ServerTraffic(10, 1, **figures)}
        status = RouteStatus("e", {OLD: 100}, {OLD: ReleaseTraffic(10, 1, 0, servers)},
                             "following", "", 1)  # fmt: skip
        return ProxyAnswer(status, {})

    newer = told(arrivals=12, unanswered=2, refused=3)
    for answers, expected in (
        ([newer, newer], ServerTraffic(20, 2, 24, 4, 6)),
        ([newer, told()], ServerTraffic(20, 2)),
    ):
        sight = proxies_sight(answers)
        assert sight is not None
        assert sight.traffic[OLD].servers == {"a": expected}


def test_figures_that_were_not_read_at_one_moment_never_have_more_errors_than_ends() -> None:
    counts = Counts(total=2, error=5, active=1)
    assert traffic_of({"a": counts}).servers == {"a": ServerTraffic(5, 5, 6, 0)}


def test_another_envoy_or_server_begins_another_epoch() -> None:
    page = endpoint("10.0.0.1:8000", rq_total=10)
    servers = [pod(OLD, "10.0.0.1")]
    epoch = gateway_sight({"a": page}, servers, CLUSTER).epoch
    more = page + endpoint("10.0.0.2:8000", rq_total=1)
    others = [
        gateway_sight({"b": page}, servers, CLUSTER),
        gateway_sight({"a": page, "b": page}, servers, CLUSTER),
        gateway_sight({"a": page}, [pod(OLD, "10.0.0.1", uid="again")], CLUSTER),
        gateway_sight({"a": more}, [*servers, pod(NEW, "10.0.0.2")], CLUSTER),
        gateway_sight({"a": page}, servers, CLUSTER, resets=1),
    ]
    assert len({epoch, *(sight.epoch for sight in others)}) == 6
    later = endpoint("10.0.0.1:8000", rq_total=99)
    assert gateway_sight({"a": later}, servers, CLUSTER).epoch == epoch


# --- the fuse -------------------------------------------------------------------------------------


def sight(epoch: str = "e", **counts: Counts) -> DataPlaneSight:
    by_release = {{"old": OLD, "new": NEW}[name]: one for name, one in counts.items()}
    traffic = {name: traffic_of({f"{name}-0": one}) for name, one in by_release.items()}
    return DataPlaneSight(epoch, traffic, counts=by_release)


def test_first_answers_that_all_fail_are_told() -> None:
    fuse = FuseCounts()
    fuse.health(1, None, sight(old=Counts(success=500)))
    fuse.health(1, NEW, sight("f", old=Counts(success=600), new=Counts(error=4)))
    health = fuse.health(1, NEW, sight("f", old=Counts(success=700), new=Counts(error=12)))
    assert health[NEW] == ReleaseHealth(0, answers=12, failures=FIRST_ANSWERS)
    assert health[OLD].failures == 0


def test_one_success_and_they_did_not_all_fail() -> None:
    fuse = FuseCounts()
    fuse.health(1, None, sight(old=Counts()))
    fuse.health(1, NEW, sight("f", new=Counts(success=1, error=1)))
    # Another server of the release comes: counts begin anew, the success does not count for less.
    fuse.health(1, NEW, sight("g", new=Counts(success=1, error=2)))
    health = fuse.health(1, NEW, sight("g", new=Counts(success=1, error=30)))
    assert health[NEW].failures == 0


def test_failed_connections_in_a_row_end_with_a_success() -> None:
    fuse = FuseCounts()
    seen = Counts(success=10)
    fuse.health(1, NEW, sight(new=seen))
    for failures in (2, 4):
        seen = replace(seen, connect_failures=failures)
        health = fuse.health(1, NEW, sight(new=seen))
    assert health[NEW].connection_failures == 4
    health = fuse.health(1, NEW, sight(new=replace(seen, success=11, connect_failures=5)))
    assert health[NEW].connection_failures == 1


def test_what_was_counted_before_the_exposure_is_no_failure_in_it() -> None:
    fuse = FuseCounts()
    fuse.health(1, None, sight(new=Counts(error=50)))
    assert fuse.health(1, NEW, sight(new=Counts(error=52)))[NEW].answers == 2
    assert fuse.health(2, NEW, sight(new=Counts(error=53)))[NEW].answers == 1


def test_without_sight_there_is_nothing_to_tell() -> None:
    assert FuseCounts().health(1, NEW, None) == {}


# --- our proxies ----------------------------------------------------------------------------------


def answer(
    epoch: str, weight: int, arrivals: int, health: ReleaseHealth, **servers: ServerTraffic
) -> ProxyAnswer:
    status = RouteStatus(
        epoch=epoch,
        weights={OLD: 100 - weight, NEW: weight},
        traffic={NEW: ReleaseTraffic(arrivals, 1, 2, servers)},
        guard="following",
        guard_reason="",
        channel_generation=1,
    )
    return ProxyAnswer(status, {NEW: health})


def test_proxies_are_added_up_once_they_have_the_same_weights() -> None:
    one = answer("a", 10, 5, ReleaseHealth(1, 6, 6, 3))
    two = answer("b", 10, 7, ReleaseHealth(1, 4, 4, 0))
    found = proxies_sight([one, two])
    assert found is not None
    assert found.traffic == {NEW: ReleaseTraffic(12, 2, 4)}
    assert found.health == {NEW: ReleaseHealth(0, 10, 10, 3)}
    assert proxies_sight([one, answer("b", 50, 7, ReleaseHealth())]) is None
    restarted = proxies_sight([one, answer("c", 10, 0, ReleaseHealth(1, 40, 2, 0))])
    assert restarted is not None
    assert restarted.epoch != found.epoch
    assert restarted.health is not None
    assert restarted.health[NEW].failures == 0


def test_servers_of_several_proxies_are_added_up() -> None:
    one = answer("a", 10, 5, ReleaseHealth(), x=ServerTraffic(3, 1))
    two = answer("b", 10, 7, ReleaseHealth(), x=ServerTraffic(4, 0), y=ServerTraffic(1, 1))
    found = proxies_sight([one, two])
    assert found is not None
    assert found.traffic[NEW].servers == {"x": ServerTraffic(7, 1), "y": ServerTraffic(1, 1)}


def test_a_proxy_of_an_older_version_tells_sums_only() -> None:
    new = TypeAdapter(ProxyAnswer).dump_python(answer("a", 10, 5, ReleaseHealth()))
    assert new["status"]["traffic"][NEW].pop("servers") == {}
    old = TypeAdapter(ProxyAnswer).validate_python(new)
    assert old.status.traffic == {NEW: ReleaseTraffic(5, 1, 2)}


# --- the router -----------------------------------------------------------------------------------


class FakeEnvoy:
    """Answers like Envoy's statistics."""

    def __init__(self) -> None:
        self.page = ""
        envoy = self

        class Pages(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = envoy.page.encode()
                self.send_response(200 if self.path == "/stats/prometheus" else 404)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
        self.port = self.server.server_address[1]
        Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def envoy() -> Iterator[FakeEnvoy]:
    made = FakeEnvoy()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def fake(envoy: FakeEnvoy) -> Iterator[FakeCluster]:
    """A cluster with a route at 90/10 that its gateway has taken."""
    with FakeCluster.running() as fake:
        fake.put(NAMESPACE, {"metadata": {"name": "envoy-gateway-system"}})
        fake.put(
            POD,
            {
                "metadata": {
                    "name": "envoy-1",
                    "namespace": "envoy-gateway-system",
                    "labels": {
                        "gateway.envoyproxy.io/owning-gateway-name": PLACE.gateway,
                        "gateway.envoyproxy.io/owning-gateway-namespace": NS,
                    },
                },
                "status": {
                    "podIP": "127.0.0.1",
                    "conditions": [{"type": "Ready", "status": "True"}],
                },
            },
        )
        put_route(fake)
        put_pod(fake, OLD, ip="10.0.0.1")
        put_pod(fake, NEW, ip="10.0.0.2")
        follow(fake, Wish.of(make_channel(weight=10)), {OLD: 90, NEW: 10})
        accept(fake)
        yield fake


@pytest.fixture
def router(fake: FakeCluster, envoy: FakeEnvoy) -> KubernetesRouter:
    return KubernetesRouter(fake.client(), place(gateway_stats_port=envoy.port))


def test_the_status_has_weights_arrivals_and_the_guards_word(
    router: KubernetesRouter, envoy: FakeEnvoy
) -> None:
    envoy.page = endpoint("10.0.0.1:8000", rq_total=90, rq_success=90) + endpoint(
        "10.0.0.2:8000", rq_total=9, rq_success=7
    )
    status = router.status(ENVIRONMENT, MODEL)
    assert status is not None
    assert status.weights == {OLD: 90, NEW: 10}
    assert status.traffic == {
        OLD: ReleaseTraffic(90, 0, 0, {f"{OLD}-0": ServerTraffic(90, 0, 90, 0)}),
        NEW: ReleaseTraffic(9, 0, 0, {f"{NEW}-0": ServerTraffic(9, 0, 9, 2)}),
    }
    assert (status.guard, status.guard_reason, status.channel_generation) == ("following", "", 1)


def test_a_release_without_endpoints_has_no_arrivals(
    router: KubernetesRouter, envoy: FakeEnvoy
) -> None:
    envoy.page = endpoint("10.0.0.1:8000", rq_total=90)
    status = router.status(ENVIRONMENT, MODEL)
    assert status is not None
    assert status.traffic[NEW] == ReleaseTraffic(0, 0, 0)


def test_counters_that_went_back_begin_another_epoch(
    router: KubernetesRouter, envoy: FakeEnvoy
) -> None:
    envoy.page = endpoint("10.0.0.1:8000", rq_total=90)
    before = router.status(ENVIRONMENT, MODEL)
    again = router.status(ENVIRONMENT, MODEL)
    envoy.page = endpoint("10.0.0.1:8000", rq_total=3)
    after = router.status(ENVIRONMENT, MODEL)
    assert before is not None
    assert after is not None
    assert again is not None
    assert (again.epoch == before.epoch, after.epoch == before.epoch) == (True, False)


def test_nobody_knows_the_weights_before_the_gateway_has_taken_them(
    router: KubernetesRouter, fake: FakeCluster
) -> None:
    follow(fake, Wish.of(make_channel(weight=50, generation=2)), {OLD: 50, NEW: 50})
    assert router.status(ENVIRONMENT, MODEL) is None
    accept(fake)
    status = router.status(ENVIRONMENT, MODEL)
    assert status is not None
    assert (status.weights, status.channel_generation) == ({OLD: 50, NEW: 50}, 2)


@pytest.mark.parametrize("broken", ["route", "api", "envoy", "page", "rule", "gateway"])
def test_what_cannot_be_told_is_none(
    router: KubernetesRouter,
    fake: FakeCluster,
    envoy: FakeEnvoy,
    caplog: pytest.LogCaptureFixture,
    broken: str,
) -> None:
    match broken:
        case "route":
            fake.remove(HTTP_ROUTE, NAME)
        case "api":
            fake.faults.append(Fault(status=503))
        case "envoy":
            envoy.server.shutdown()
            envoy.server.server_close()
        case "page":
            envoy.page = endpoint("10.0.0.1:8000", rq_total=90)[:-5] + '} "'
        case "rule":
            fake.edit(HTTP_ROUTE, NAME, lambda body: body["spec"]["rules"].pop())
            accept(fake)
        case "gateway":
            fake.remove(POD, "envoy-1", "envoy-gateway-system")
    assert router.status(ENVIRONMENT, MODEL) is None
    assert caplog.text


def test_an_adopted_pod_says_where_it_serves() -> None:
    pod = {
        "metadata": {"annotations": {"trainyard.dev/port": "80"}},
        "spec": {"containers": [{"ports": [{"name": "http", "containerPort": 9000}]}]},
    }
    assert port_of(pod, "http", 8000) == 80
    assert port_of(pod, "status", 8081) == 8081
    assert port_of({**pod, "metadata": {}}, "http", 8000) == 9000
