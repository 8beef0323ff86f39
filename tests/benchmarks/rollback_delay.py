"""How long a bad release goes on getting requests once it is known to be bad.

    python tests/benchmarks/rollback_delay.py [--times 3] [--rate 40]

Clients stream through the real proxy to fake servers, while the real driver, judge and guard roll
a slow release out. The clock runs from the decision to the last request that reaches the release:

- `trigger`: the trigger drives the rollout, as in Airflow's triggerer, which needs neither
  scheduler nor workers nor a slot. From the moment at which the look that says HARM was taken.
- `command`: nobody drives any more (scheduler, workers and triggerer are stopped), and a person
  gives `trainyard abort`. From the start of the command's work.
- `lease`: the same, and nobody does anything: the guard acts when the lease ends. From the end of
  the driver's last tick; the lease is made short here, its length is printed beside it.

It ends with an error if one delay is over what is promised: 2 s, after the lease where it is that
which ends the rollout.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.serving_world import ENVIRONMENT, MODEL
from tests.stream_world import Answer, StreamYard, stream_yard

from trainyard.documents.channel import Channel
from trainyard.documents.look import Look
from trainyard.documents.release import Release
from trainyard.rollout import by_hand
from trainyard.settings import get_settings
from trainyard.store.documents import read_document

PROMISED_S = 2.0
LEASE_S = 10.0
AFTER_S = 3.0
"""Seconds for which clients go on, so that a late request would be seen."""


def last_arrival(answers: list[Answer], release: Release) -> float:
    """Return when the last request was sent that reached a release, in seconds since 1970."""
    return max(answer.sent for answer in answers if answer.release == release.release_id)


def holding(channel: Channel) -> bool:
    """Tell whether the candidate has its last share of the traffic."""
    rollout = channel.rollout
    return rollout is not None and rollout.phase == "holding" and rollout.step_index == 1


def by_trigger(world: StreamYard, number: int, rate: float) -> float:
    """Let the trigger roll a slow release out and back."""
    from trainyard_airflow.rollout_trigger import RolloutTrigger

    release = world.publish(f"slow-{number}")
    request = {"model": MODEL, "release": release.release_id, "force": False, "reason": None}
    trigger = RolloutTrigger(
        environment=ENVIRONMENT,
        kind="promote",
        request=json.dumps(request),
        requested_by="benchmark",
        run_id=f"run-{number}",
    )

    async def fire() -> Any:
        return [event.payload async for event in trigger.run()]

    with world.clients(rate) as answers:
        (event,) = asyncio.run(fire())
        time.sleep(AFTER_S)
    assert event["outcome"] == "rolled_back", event
    rollout = world.channel.rollout
    assert rollout is not None
    look = read_document(world.yard.store, rollout.evidence_key, Look)
    assert look.verdict is not None
    assert look.verdict.outcome == "HARM"
    return last_arrival(answers, release) - look.snapshot.at.timestamp()


def forsaken(world: StreamYard, name: str) -> Release:
    """Bring a good release to its last step, and drive it no more."""
    release = world.publish(
        name, steps=[{"weight": 20, "hold_s": 1}, {"weight": 50, "hold_s": 600}]
    )
    # Shorter than an environment may have it, so that the benchmark does not take all day.
    deps = world.rollouts.deps
    rules = deps.environments[ENVIRONMENT].model_copy(update={"lease_s": LEASE_S})
    # It is not in the environments file, so that one is not to be read again.
    changed = replace(deps, environments={ENVIRONMENT: rules}, read_environments=None)
    short = replace(world.rollouts, deps=changed)
    tick = short.begin(
        kind="promote",
        model=MODEL,
        environment=ENVIRONMENT,
        release_id=release.release_id,
        run_id=f"run-{name}",
    )
    world.drive(tick, until=holding)
    return release


def by_command(world: StreamYard, number: int, rate: float) -> float:
    """Let a person abort a rollout that nobody drives."""
    with world.clients(rate) as answers:
        release = forsaken(world, f"command-{number}")
        time.sleep(1.0)
        began = time.time()
        end(world, f"abort-{number}")
        time.sleep(AFTER_S)
    return last_arrival(answers, release) - began


def by_lease(world: StreamYard, number: int, rate: float) -> float:
    """Let the lease of a rollout end that nobody drives."""
    with world.clients(rate) as answers:
        release = forsaken(world, f"lease-{number}")
        began = time.time()
        time.sleep(LEASE_S + AFTER_S)
    end(world, f"clean-{number}")
    return last_arrival(answers, release) - began


def end(world: StreamYard, run_id: str) -> None:
    """End the rollout under way, as `trainyard abort` does."""
    by_hand.abort_rollout(
        world.rollouts.deps,
        MODEL,
        ENVIRONMENT,
        reason="It is a benchmark.",
        who="benchmark",
        run_id=run_id,
        say=lambda line: None,
        timeout_s=240.0,
    )


def main() -> int:
    """Print one line a way; return 1 if a promise was not kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--rate", type=float, default=40.0)
    args = parser.parse_args()
    os.environ.setdefault("AIRFLOW__LOGGING__LOGGING_LEVEL", "WARNING")
    logging.disable(logging.INFO)
    ways: tuple[tuple[str, Callable[[StreamYard, int, float], float], str, float], ...] = (
        ("trigger", by_trigger, "after the look that says HARM", PROMISED_S),
        ("command", by_command, "after `trainyard abort`", PROMISED_S),
        ("lease", by_lease, f"after the last tick; lease {LEASE_S:g} s", LEASE_S + PROMISED_S),
    )
    late = []
    with (
        tempfile.TemporaryDirectory(prefix="trainyard-bench-") as name,
        stream_yard(Path(name), guard_interval_s=0.5) as world,
    ):
        os.environ["TRAINYARD_HOME"] = str(world.settings.home)
        os.environ["TRAINYARD_ENVIRONMENTS"] = str(world.settings.environments)
        get_settings.cache_clear()
        world.first()
        print(f"last request that reaches the release, {args.rate:g} requests a second")
        for way, measure, what, promised_s in ways:
            took = [measure(world, number, args.rate) for number in range(args.times)]
            print(
                f"{way:8} median {statistics.median(took):6.2f} s, worst {max(took):6.2f} s "
                f"of {len(took)}: {what}; promised: {promised_s:g} s",
                flush=True,
            )
            if max(took) > promised_s:
                late.append(way)
    if late:
        print(f"The promise was not kept: {', '.join(late)}.")
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
