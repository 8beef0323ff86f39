"""The judge on two real servers: the same traffic, sent to vLLM on this machine.

    python tests/benchmarks/judge_on_vllm.py [--rollouts 5] [--kind slowed] [--rate 6]

Two servers of the demonstration model start from one bundle. Canaries are replayed against them,
with the steps and the judge of `dags/models/adder.yaml`: clients send requests at random moments,
each to one of the two servers as the weights say; counters are scraped a slice at a time by the
rollout's own reader, and the judge looks after every slice. Half of the candidates are unchanged;
the others are stopped (SIGSTOP) for two thirds of the time, 10 of every 15 ms, so that they take
about three times as long. Whatever else is slow here (two servers and their clients share the
cores) is real and hits both.

Argo's and Kayenta's rules look at the same requests, as clients saw them, with a slice in place of
a minute; what they have not rejected at the end they promote. `tests/benchmarks/judge` has
thousands of simulated rollouts; these few show that what it assumes is not far from a real server.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.benchmarks.judge.peers import PEERS, Minutes
from tests.benchmarks.judge.traffic import BIN_FIRST_S, BIN_LOG_WIDTH, BINS
from tests.lane_world import compile_model, train

from trainyard.documents.channel import Channel, RolloutPlan, Track
from trainyard.documents.evidence import Verdict
from trainyard.documents.look import ReleaseCounters, RouteCounters, Snapshot
from trainyard.documents.plan import Plan
from trainyard.materialize import materialize_bundle
from trainyard.rollout.judge import replay
from trainyard.rollout.plan_rollout import promotion_plan
from trainyard.rollout.readers.scrape import HttpMetricReader
from trainyard.rollout.slices import blocks_from_snapshots
from trainyard.serving.process import ServerProcess
from trainyard.serving.protocol import ServerStatus
from trainyard.spec.environments import Environment

STABLE, CANDIDATE = "adder-stable", "adder-candidate"
TRACKS = (STABLE, CANDIDATE)
STOPPED_S, RUNNING_S = 0.010, 0.005
"""Short beside a request: what a server is stopped for before it has read a request, it cannot
count."""
KINDS = ("no change", "slowed")
COMPARED = ("argo ratio", "kayenta 1 min")
"""The peers that compare the two releases with each other, and need no figures from before."""


@dataclass
class Slice:
    """What clients saw of one release in one slice."""

    requests: int = 0
    errors: int = 0
    ttft_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """What became of one canary."""

    said: str
    """HARM, NON_INFERIOR, or UNDECIDED to the end."""
    at_s: float
    ttft_ratio: float
    """Candidate's time to first token over stable's, as clients saw it."""
    exposed: int
    errors: int
    peers: dict[str, float]
    """Slices after which each peer rolled back; `inf` is never."""


@contextmanager
def servers(home: Path) -> Iterator[tuple[Plan, dict[str, ServerProcess]]]:
    """Start one server a release; stop both."""
    train(home, {"r1": 3})
    made = compile_model(home)
    started: dict[str, ServerProcess] = {}
    try:
        for name in TRACKS:
            cache_dir = materialize_bundle(made.store, made.bundle, home / name / "cache")
            started[name] = made.start(cache_dir)
        for process in started.values():
            process.wait_healthy(300)
        yield made.plan, started
    finally:
        for process in started.values():
            process.stop(0)


@contextmanager
def slowed(process: ServerProcess) -> Iterator[None]:
    """Stop a server, with all its processes, for two thirds of the time.

    Not the one that holds the server's leash: it must end a stopped server if we are killed.
    """
    family = psutil.Process(process.identity.pid).children(recursive=True)
    over = threading.Event()

    def freeze() -> None:
        while not over.is_set():
            for stop, pause_s in ((True, STOPPED_S), (False, RUNNING_S)):
                for each in family:
                    os.kill(each.pid, signal.SIGSTOP if stop else signal.SIGCONT)
                over.wait(pause_s) if not stop else time.sleep(pause_s)

    thread = threading.Thread(target=freeze)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def weight_at(plan: RolloutPlan, t: float) -> int:
    """Return the candidate's percent after `t` seconds; the last step has no end."""
    for step in plan.steps[:-1]:
        if t < step.hold_s:
            return step.weight
        t -= step.hold_s
    return plan.steps[-1].weight


async def ask(client: httpx.AsyncClient, url: str, seen: Slice, chance: random.Random) -> None:
    """Send one request and note how it went."""
    prompt = f"{chance.randrange(100)}+{chance.randrange(100)}="
    body = {"model": "adder", "prompt": prompt, "max_tokens": 8, "stream": True, "ignore_eos": True}
    begun = time.monotonic()
    times: list[float] = []
    try:
        async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    times.append(time.monotonic())
    except httpx.HTTPError:
        seen.errors += 1
    seen.requests += 1
    if len(times) > 1:
        seen.ttft_s.append(times[0] - begun)
        seen.tpot_s.append((times[-1] - times[0]) / (len(times) - 1))


async def canary(
    plan: RolloutPlan,
    started: dict[str, ServerProcess],
    *,
    slow: bool,
    rate: float,
    longest_s: float,
    seed: int,
) -> Outcome:
    """Replay one canary until the judge knows, or to the end."""
    chance = random.Random(seed)
    slice_s = plan.judge.block_s
    reader = HttpMetricReader()
    statuses = [
        ServerStatus(f"{name}-0", name, "ready", process.url, _started_at(process), 0, "")
        for name, process in started.items()
    ]
    totals = {name: Slice() for name in TRACKS}
    slices: list[dict[str, Slice]] = []
    snapshots: list[Snapshot] = []
    epoch = datetime.now(UTC)
    begun = time.monotonic()
    verdict: Verdict | None = None
    running: set[asyncio.Task[None]] = set()

    def look(t: float, weight: int) -> None:
        route = RouteCounters(
            epoch="1",
            weights={STABLE: 100 - weight, CANDIDATE: weight},
            releases={
                name: ReleaseCounters(arrivals=one.requests, errors=one.errors, in_flight=0)
                for name, one in totals.items()
            },
        )
        at = epoch + timedelta(seconds=t)
        pods = reader.read("benchmark", statuses)
        snapshots.append(Snapshot(at=at, phase="holding", step_index=0, pods=pods, route=route))

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=60, limits=limits, trust_env=False) as client:
        with slowed(started[CANDIDATE]) if slow else nullcontext():
            await asyncio.to_thread(look, 0.0, weight_at(plan, 0.0))
            while time.monotonic() - begun < longest_s:
                began_s = time.monotonic() - begun
                weight = weight_at(plan, began_s)
                here = {name: Slice() for name in TRACKS}
                while (left_s := began_s + slice_s - (time.monotonic() - begun)) > 0:
                    await asyncio.sleep(min(left_s, chance.expovariate(rate)))
                    name = CANDIDATE if chance.random() * 100 < weight else STABLE
                    task = asyncio.create_task(ask(client, started[name].url, here[name], chance))
                    running.add(task)
                    task.add_done_callback(running.discard)
                slices.append(here)
                for name in TRACKS:
                    totals[name].requests = sum(one[name].requests for one in slices)
                    totals[name].errors = sum(one[name].errors for one in slices)
                # Under the old weight at the end of its slice and under the new one at the same
                # moment: a slice has one weight.
                t = time.monotonic() - begun
                await asyncio.to_thread(look, t, weight)
                if weight_at(plan, t) != weight:
                    await asyncio.to_thread(look, t + 1e-3, weight_at(plan, t))
                blocks = blocks_from_snapshots(
                    snapshots, exposed_since=epoch, candidate=CANDIDATE, stable=STABLE
                )
                looks = [one for one in replay(blocks, plan.judge) if one.outcome != "UNDECIDED"]
                verdict = looks[0] if looks else None
                if verdict is not None:
                    break
        await asyncio.gather(*running)
    return _outcome(verdict, slices, time.monotonic() - begun)


def _outcome(verdict: Verdict | None, slices: list[dict[str, Slice]], at_s: float) -> Outcome:
    means = {n: statistics.fmean(t for s in slices for t in s[n].ttft_s) for n in TRACKS}
    minutes = minutes_of(slices)
    return Outcome(
        said=verdict.outcome if verdict else "UNDECIDED",
        at_s=verdict.at if verdict else at_s,
        ttft_ratio=means[CANDIDATE] / means[STABLE],
        exposed=sum(one[CANDIDATE].requests for one in slices),
        errors=sum(one[name].errors for one in slices for name in TRACKS),
        peers={
            peer.name: float(peer.decide(minutes, peer.setting)[0])
            for peer in PEERS
            if peer.name in COMPARED
        },
    )


def minutes_of(slices: list[dict[str, Slice]]) -> Minutes:
    """Return what the peers read, a slice in place of a minute."""

    def of(value: str) -> np.ndarray:
        return np.array([[[float(value_of(s[n], value)) for n in TRACKS] for s in slices]])

    def value_of(one: Slice, value: str) -> float:
        return {
            "requests": float(len(one.tpot_s)),
            "counted": float(max(one.requests, 1)),
            "errors": float(one.errors),
            "tpot": sum(one.tpot_s),
        }[value]

    histogram = np.zeros((1, len(slices), 2, BINS))
    for i, one in enumerate(slices):
        for j, name in enumerate(TRACKS):
            places = np.log(np.array(one[name].ttft_s) / BIN_FIRST_S) / BIN_LOG_WIDTH
            np.add.at(histogram[0, i, j], np.clip(places.astype(int), 0, BINS - 1), 1)
    return Minutes(of("requests"), of("counted"), of("errors"), of("tpot"), histogram)


def _started_at(process: ServerProcess) -> datetime:
    return datetime.fromtimestamp(psutil.Process(process.identity.pid).create_time(), UTC)


def rollout_plan(plan: Plan) -> RolloutPlan:
    """Return what a promotion on the embedded platform would pin."""
    stable = Track(release_id=STABLE, since=datetime.now(UTC))
    channel = Channel(schema="trainyard/v1", model="adder", environment="production", stable=stable)
    environment = Environment(target="cpu", devices=2)
    return promotion_plan(channel, plan.spec.rollout, environment, drain_timeout_s=10)


def main() -> int:
    """Print what the judge and the peers said of each canary.

    Returns 1 if the judge did not roll back one that was slowed, or did roll back another.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rollouts", type=int, default=5, help="of each kind (5)")
    parser.add_argument("--rate", type=float, default=6.0, help="requests a second (6)")
    parser.add_argument("--longest", type=float, default=240.0, help="seconds of a canary (240)")
    parser.add_argument("--kind", choices=KINDS, action="append", help="only these (both)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as folder, servers(Path(folder)) as (plan, started):
        pinned = rollout_plan(plan)
        steps = ", ".join(f"{step.weight} % for {step.hold_s:g} s" for step in pinned.steps)
        print(f"{steps}; {args.rate:g} requests a second, at most {args.longest:g} s", flush=True)
        for kind in args.kind or KINDS:
            outcomes = []
            for number in range(args.rollouts):
                outcome = asyncio.run(
                    canary(
                        pinned,
                        started,
                        slow=kind == "slowed",
                        rate=args.rate,
                        longest_s=args.longest,
                        seed=args.seed + number,
                    )
                )
                outcomes.append(outcome)
                wrong += (outcome.said == "HARM") != (kind == "slowed")
                print(f"{kind}: {outcome}", flush=True)
            print(summary(kind, outcomes), flush=True)
    return int(wrong > 0)


def summary(kind: str, outcomes: list[Outcome]) -> str:
    """Return one line on canaries of a kind."""
    said = {name: [o for o in outcomes if o.said == name] for name in ("HARM", "NON_INFERIOR")}
    lines = [
        f"{kind}, {len(outcomes)} canaries: judge rolled back {len(said['HARM'])}, promoted "
        f"{len(said['NON_INFERIOR'])}"
    ]
    decided = [one.at_s for one in outcomes if one.said != "UNDECIDED"]
    if decided:
        lines.append(f"median {statistics.median(decided):.0f} s")
    ratio = statistics.median(one.ttft_ratio for one in outcomes)
    lines.append(f"time to first token {ratio:.2f} times stable's")
    for name in COMPARED:
        fired = sum(one.peers[name] < np.inf for one in outcomes)
        lines.append(f"{name} rolled back {fired}")
    return "; ".join(lines)


if __name__ == "__main__":
    sys.exit(main())
