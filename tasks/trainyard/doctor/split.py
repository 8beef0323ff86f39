"""Does the gateway split as its weights say? Requests, and a binomial test of where they arrived.

Some gateways accept weights and do not follow them, and some follow a cookie instead. So ordinary
requests are sent, and what arrived at each release meanwhile is compared with the weights; then
requests that ask for one release by header, none of which may arrive at the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import httpx

from trainyard.doctor.report import Check, fail, ok, warn
from trainyard.serving.protocol import RouteStatus
from trainyard.serving.relay import TRACK_HEADER

REQUESTS = 500
"""Ordinary requests, and as many that name a track: facts of `docs/doctor.md`."""
CHANCE = 1e-4
"""A gateway that splits rightly fails the test this rarely."""
_AT_ONCE = 8
_TIMEOUT_S = 10.0

Send = Callable[[int, Mapping[str, str]], int]
"""Sends so many requests with these headers; returns how many got an answer below 500."""
Look = Callable[[], RouteStatus | None]


def split_checks(
    look: Look, send: Send, *, stable: str, requests: int = REQUESTS
) -> Iterator[Check]:
    """Yield whether requests arrive as the weights say.

    Args:
        look: tells weights and arrivals; other traffic may go on meanwhile.
        send: sends requests through the gateway.
        stable: release id of the stable release.
        requests: how many of each kind.
    """
    name = "traffic: split"
    before = look()
    if before is None:
        yield warn(
            name,
            "Nobody can tell the route's weights and arrivals.",
            "Make the channel (`trainyard channel init`), and look at the gateway or the proxy.",
        )
        return
    answered = send(requests, {})
    after = look()
    if after is None or after.epoch != before.epoch or after.weights != before.weights:
        yield warn(name, "The route changed while it was looked at.", "Try again.")
        return
    yield _answers("traffic: answers", answered, requests)
    arrived = _arrived(before, after)
    yield from judge_split(arrived, after.weights, at_least=requests)
    tagged = send(requests, {TRACK_HEADER: "stable"})
    last = look()
    if last is None or last.epoch != after.epoch or last.weights != after.weights:
        yield warn("traffic: pins", "The route changed while it was looked at.", "Try again.")
        return
    yield _pins(_arrived(after, last), stable, tagged, requests, after.weights)


def judge_split(
    arrived: Mapping[str, int], weights: Mapping[str, int], *, at_least: int
) -> Iterator[Check]:
    """Yield the verdict on a split. Pure.

    Args:
        arrived: requests by release id.
        weights: percent by release id.
        at_least: requests that were sent, so that as many must have arrived somewhere.
    """
    from scipy.stats import binomtest

    name = "traffic: split"
    total = sum(arrived.values())
    if total < at_least:
        yield fail(
            name,
            f"Of {at_least} requests {total} arrived at servers of the channel.",
            "The address may lead to another route, or the gateway does not take this one.",
        )
        return
    for release_id, weight in sorted(weights.items()):
        here = arrived.get(release_id, 0)
        share = here / total
        chance = binomtest(here, total, weight / 100).pvalue
        words = f"{here} of {total} requests ({share:.1%}) arrived at {release_id}, weight {weight}"
        if chance < CHANCE:
            yield fail(
                name,
                f"{words}: that is no chance (p = {chance:.1g}).",
                "The gateway does not follow the weights: look for session affinity, for another "
                "route of the same host, or take `data_plane: proxy`.",
            )
        else:
            yield ok(name, f"{words} (p = {chance:.2g}).")


def http_sender(url: str, *, path: str = "/v1/models") -> Send:
    """Return a sender that asks an address; each request has a connection of its own.

    A connection that is kept would go to one backend of some gateways again and again.
    """

    def one(headers: Mapping[str, str]) -> bool:
        try:
            with httpx.Client(trust_env=False, timeout=_TIMEOUT_S) as client:
                answer = client.get(f"{url.rstrip('/')}{path}", headers=dict(headers))
        except httpx.HTTPError:
            return False
        return answer.status_code < 500

    def send(count: int, headers: Mapping[str, str]) -> int:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return sum(pool.map(one, [headers] * count))

    return send


def _arrived(before: RouteStatus, after: RouteStatus) -> dict[str, int]:
    def at(status: RouteStatus, release_id: str) -> int:
        traffic = status.traffic.get(release_id)
        return traffic.arrivals if traffic else 0

    return {name: at(after, name) - at(before, name) for name in after.traffic}


def _answers(name: str, answered: int, requests: int) -> Check:
    if answered == requests:
        return ok(name, f"All {requests} requests were answered.")
    return fail(
        name,
        f"{requests - answered} of {requests} requests failed.",
        "Look at the servers and at the gateway's own log.",
    )


def _pins(
    arrived: Mapping[str, int],
    stable: str,
    answered: int,
    requests: int,
    weights: Mapping[str, int],
) -> Check:
    """Judge requests that named the stable track."""
    name = "traffic: pins"
    if answered < requests:
        return fail(
            name,
            f"{requests - answered} of {requests} requests with {TRACK_HEADER}: stable failed.",
            "Make the channel's route anew (`trainyard channel init`): a rule for pins is missing.",
        )
    elsewhere = sum(count for name_, count in arrived.items() if name_ != stable)
    # What others send meanwhile is split; what was pinned may not be.
    share = sum(weight for name_, weight in weights.items() if name_ != stable) / 100
    if share and elsewhere > share * requests / 2:
        return fail(
            name,
            f"{elsewhere} requests arrived at the candidate while {requests} asked for stable.",
            "The gateway does not match the header: look at the rules pinned-stable and "
            "pinned-candidate of the route.",
        )
    return ok(name, f"{requests} requests with {TRACK_HEADER}: stable were answered there.")
