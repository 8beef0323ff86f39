"""How long one process takes to check many models against a Hub that answers slowly.

    python tests/benchmarks/refresh.py [--models 200] [--latency-ms 50]

The Hub is a server of this machine that speaks the Hub's protocol and waits before every answer;
the store is a folder. Measured are a first check, in which every model is new and is written down,
and a second one, in which nothing is. The aim is 5 s for 200 models; one request after the other
would wait ten seconds alone.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.hub_server import HubServer
from tests.refresh_world import RefreshWorld

AIM_S = 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=200)
    parser.add_argument("--latency-ms", type=float, default=50.0)
    options = parser.parse_args()
    names = [f"model-{number:03d}" for number in range(options.models)]
    with tempfile.TemporaryDirectory() as folder, HubServer() as hub:
        world = RefreshWorld(Path(folder), hub)
        for name in names:
            world.add(name, follow_toolchain=False)
        hub.latency_s = options.latency_ms / 1000
        alone_s = options.models * hub.latency_s
        print(
            f"{options.models} models, {options.latency_ms:g} ms before each answer, at most "
            f"{world.settings.refresh_concurrency} at the same time"
        )
        for what in ("first check: all are new", "second check: nothing is new"):
            hub.seen.clear()
            hub.most_at_once = 0
            began, worked = time.perf_counter(), time.process_time()
            checks = world.refresher().check_all(names)
            passed_s = time.perf_counter() - began
            outcomes = Counter(each.decision.outcome for each in checks if each.decision)
            assert sum(outcomes.values()) == options.models
            print(
                f"{what:<30} {passed_s:6.2f} s passed, {time.process_time() - worked:6.2f} s of "
                f"processor (the Hub's included); {passed_s / AIM_S:.2f} of the aim, "
                f"{passed_s / alone_s:.2f} of waiting alone; {len(hub.seen)} requests, at most "
                f"{hub.most_at_once} at once; {dict(outcomes)}"
            )


if __name__ == "__main__":
    main()
