"""Lets a server finish its requests before its pod ends: the pod's preStop hook.

    python -m trainyard.serving.kubernetes.drain --port 8000 --settle-s 20 --timeout-s 60

The pod has left its Service when this starts, but data planes learn of that one after the other, so
requests still come for a while (`--settle-s`). After that it waits until the engine has none,
running or queued. Only then Kubernetes sends SIGTERM, which older servers answer by dropping what
they have.

Sources: facts of the Gateway API on EKS (pods sleep 15 to 30 s before they stop); vLLM's
`--shutdown-timeout` exists from 0.18 on only.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import httpx

from trainyard.serving.keeper import requests_in

POLL_S = 1.0
ANSWER_S = 5.0
IDLE_LOOKS = 2
"""Looks in a row without a request: between two, one may have arrived."""


def drain(
    ask: Callable[[], int | None],
    *,
    timeout_s: float,
    monotonic: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> bool:
    """Wait until a server has no requests; tell whether it came to that.

    Args:
        ask: returns its number of requests; None if it does not say.
        timeout_s: seconds to wait at most.
        monotonic: the clock.
        sleep: waits.
    """
    until = monotonic() + timeout_s
    idle = 0
    while True:
        idle = idle + 1 if ask() == 0 else 0
        if idle >= IDLE_LOOKS:
            return True
        if monotonic() >= until:
            return False
        sleep(POLL_S)


def asked(port: int) -> int | None:
    """Return how many requests the server on `port` has; None if it does not say."""
    try:
        # No proxy of the environment may come between us and loopback.
        with httpx.Client(trust_env=False, timeout=ANSWER_S) as client:
            return requests_in(client.get(f"http://127.0.0.1:{port}/metrics").text)
    except (httpx.HTTPError, ValueError):
        return None


def main() -> None:
    """Wait as the arguments say; exit 0 in any case, since the pod ends all the same."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--settle-s", type=float, required=True)
    parser.add_argument("--timeout-s", type=float, required=True)
    options = parser.parse_args()
    time.sleep(options.settle_s)
    if not drain(lambda: asked(options.port), timeout_s=options.timeout_s):
        print("There are requests left, and no time.", file=sys.stderr)


if __name__ == "__main__":
    main()
