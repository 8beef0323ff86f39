"""Whole rollouts with probes: in a simulated world, and over real sockets."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from tests.rollout_world import ENVIRONMENT, MODEL, FakeHost, World, release_id
from tests.unit.rollout.probes.completions import completions
from tests.unit.yard import plan

from trainyard.documents.base import Provenance
from trainyard.documents.evidence import Block
from trainyard.documents.look import Look, ProbeReading
from trainyard.documents.plan import EvalAssets
from trainyard.rollout.block_log import stored_log
from trainyard.rollout.driver import DriveResult
from trainyard.rollout.judge import replay
from trainyard.rollout.looks import LookLog
from trainyard.rollout.probes.answers import Answer, compare
from trainyard.rollout.probes.prober import HttpProber, Prober, Wish
from trainyard.rollout.probes.schedule import Schedule
from trainyard.rollout.probes.tally import Tally
from trainyard.rollout.rollouts import Rollouts, Tick
from trainyard.serving.protocol import ServerStatus
from trainyard.store.documents import create_document
from trainyard.store.layout import plan_key

pytestmark = pytest.mark.integration

FILE = "adder/probes.jsonl"
SUMS = tuple((f"{number}+0=", str(number)) for number in range(400))
PROBES = {"prompts": FILE, "pairs_per_s": 4}
TTFT_S = 0.3
"""Of probes: ten times as long as users' requests take in the world."""

Replies = dict[str, Callable[[str], str | None]]
"""By release id: the answer to a prompt; None: it fails."""


def right(prompt: str) -> str | None:
    return prompt.partition("+")[0]


def wrong_by(share: int) -> Callable[[str], str | None]:
    """Return a release that gets one in `share` sums wrong."""
    return lambda prompt: "x" if int(right(prompt) or 0) % share == 0 else right(prompt)


@dataclass
class FakeProber:
    """Sends as many rounds as the world's time allows; each ends as soon as it begins."""

    world: World
    replies: Replies
    seen: list[str] = field(default_factory=list)
    wish: Wish | None = None
    schedule: Schedule | None = None
    tally: Tally = field(default_factory=Tally)
    epoch: str = "one"
    at: datetime | None = None
    until: datetime | None = None

    def keep(self, wish: Wish) -> None:
        self._settle()
        if self.schedule is None:
            self.schedule = Schedule(len(wish.prompts), wish.rollout, wish.cursor)
        self.wish, self.at = wish, self.world.now
        self.until = self.world.now + timedelta(seconds=wish.send_s)

    def read(self, rollout: str) -> ProbeReading | None:
        self._settle()
        if self.schedule is None or self.wish is None or self.wish.rollout != rollout:
            return None
        return ProbeReading(
            epoch=self.epoch, cursor=self.schedule.cursor, pods=self.tally.counters()
        )

    def stop(self) -> None:
        self._settle()
        self.until = self.at

    def slowest_s(self, rollout: str) -> float:
        return TTFT_S

    def _settle(self) -> None:
        if self.wish is None or self.at is None or self.until is None:
            return
        seconds = (min(self.world.now, self.until) - self.at).total_seconds()
        for _ in range(int(seconds * self.wish.rounds_per_s)):
            self._round(self.wish)
        if seconds * self.wish.rounds_per_s >= 1:
            self.at = self.world.now

    def _round(self, wish: Wish) -> None:
        assert self.schedule is not None
        servers = {server.name: server for server in (*wish.stable, *wish.candidate)}
        one = self.schedule.next([s.name for s in wish.stable], [s.name for s in wish.candidate])
        releases = {name: server.release_id for name, server in servers.items()}
        self.tally.sent(one, releases)
        prompt = wish.prompts[one.prompt]
        if one.scored:
            self.seen.append(prompt.text)
        found: dict[str, Answer | None] = {}
        for name in (*one.stable, *one.candidate):
            text = self.replies.get(releases[name], right)(prompt.text)
            found[name] = None if text is None else Answer(text, None, TTFT_S, 0.004)
            self._count(name)
        stable, candidate = found[one.stable[0]], found[one.candidate[0]]
        verdict = None
        if one.scored and stable is not None and candidate is not None:
            verdict = compare(
                prompt,
                stable,
                candidate,
                comparing=wish.plan.comparing,
                scoring=wish.plan.settings.scoring,
            )
        self.tally.ended(
            one,
            {name: found[name] for name in one.stable},
            {name: found[name] for name in one.candidate},
            verdict,
        )

    def _count(self, name: str) -> None:
        """Let the server count the probe among its requests, as vLLM does."""
        server = self.world.servers[name]
        server.count += 1
        server.total += TTFT_S
        server.tpot_total += 0.004
        for edge in server.buckets:
            server.buckets[edge] += edge >= TTFT_S


def make_world(rate: float = 40.0) -> World:
    """Return a world whose channel has the stable release `a`, and whose store has the prompts."""
    world = World(rate=rate)
    world.publish("a")
    assert world.run(world.promote(release_id("a"), run_id="first")).outcome == "promoted"
    made = plan().model_copy(update={"assets": EvalAssets(digest="d1", files=(FILE,))})
    create_document(world.store, plan_key(made.plan_id), made)
    lines = [json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in SUMS]
    world.store.put(f"evals/d1/{FILE}", "\n".join(lines).encode())
    return world


SHORT = {"max_duration_s": 120, "max_hold_s": 20}


def publish(
    world: World,
    name: str,
    *,
    like: str = "",
    rollout: Mapping[str, Any] | None = None,
    **probes: Any,
) -> str:
    """Publish a release with probes, perhaps with the checkpoint of another one."""
    made = world.publish(name, probes={**PROBES, **probes}, **(rollout or {}))
    changes: dict[str, Any] = {"provenance": Provenance(inputs=(plan_key(plan().plan_id),))}
    if like:
        changes["checkpoint_digest"] = world.releases[like].checkpoint_digest
    world.releases[made] = world.releases[made].model_copy(update=changes)
    return made


def begin(world: World, name: str, prober: Prober, **parts: Any) -> Tick:
    return Rollouts(world.deps(prober=prober, **parts)).begin(
        kind="promote", model=MODEL, environment=ENVIRONMENT, release_id=name, run_id="run"
    )


def looks(world: World) -> list[Look]:
    rollout = world.channel.rollout
    assert rollout is not None
    return LookLog(world.store).read(MODEL, ENVIRONMENT, rollout.number)


def log_of(world: World) -> list[Block]:
    rollout = world.channel.rollout
    assert rollout is not None
    return stored_log(world.store, MODEL, ENVIRONMENT, rollout.number)[0]


def test_a_good_release_is_promoted_with_its_answers_compared() -> None:
    world = make_world()
    b = publish(world, "b")
    prober = FakeProber(world, {})
    result = world.run(begin(world, b, prober))
    assert result.outcome == "promoted"
    assert "quality 0.00% against 0.00%" in str(world.channel.history)
    # No prompt was scored twice.
    assert len(set(prober.seen)) == len(prober.seen) > 100


def test_probes_are_no_users_and_a_strange_mix_is_no_regression() -> None:
    # At 10 % most of what the candidate answers are probes, which take ten times as long.
    world = make_world(rate=10.0)
    b = publish(world, "b")
    assert world.run(begin(world, b, FakeProber(world, {}))).outcome == "promoted"
    users = [row for row in log_of(world) if row.metric == "ttft" and not row.stratum]
    means = [row.total / row.requests for row in users if row.requests >= 10]
    assert means
    assert max(means) < 0.1
    probed = {row.metric for row in log_of(world) if row.stratum == "probe"}
    assert probed == {"ttft", "tpot", "errors", "ttft_tail", "quality"}


def test_worse_answers_alone_roll_a_release_back() -> None:
    world = make_world()
    b = publish(world, "b")
    result = world.run(begin(world, b, FakeProber(world, {b: wrong_by(3)})))
    assert result.outcome == "rolled_back"
    assert "Harm: quality" in result.summary


def test_prompts_that_both_get_wrong_are_nobodys_fault() -> None:
    world = make_world()
    b = publish(world, "b")
    replies: Replies = {b: wrong_by(3), release_id("a"): wrong_by(3)}
    assert world.run(begin(world, b, FakeProber(world, replies))).outcome == "promoted"


@pytest.mark.parametrize(("reply", "outcome"), [(right, "promoted"), (wrong_by(2), "rolled_back")])
def test_the_same_checkpoint_must_say_the_same(
    reply: Callable[[str], str | None], outcome: str
) -> None:
    world = make_world()
    b = publish(world, "b", like=release_id("a"), scoring="none")
    result = world.run(begin(world, b, FakeProber(world, {b: reply})))
    rollout = world.channel.rollout
    assert rollout is not None
    assert rollout.plan.probes is not None
    assert rollout.plan.probes.comparing == "tokens"
    assert result.outcome == outcome


def test_a_release_that_fails_probes_alone_is_rolled_back() -> None:
    world = make_world(rate=1.0)
    b = publish(world, "b")

    def flaky(prompt: str) -> str | None:
        return None if int(right(prompt) or 0) % 5 == 0 else right(prompt)

    result = world.run(begin(world, b, FakeProber(world, {b: flaky})))
    assert result.outcome == "rolled_back"
    assert "Harm: errors" in result.summary


def test_an_outage_of_the_probes_is_no_answer_and_promotes_nobody() -> None:
    world = make_world()
    b = publish(world, "b", rollout=SHORT)
    replies: Replies = {b: lambda _: None, release_id("a"): lambda _: None}
    result = world.run(begin(world, b, FakeProber(world, replies)))
    assert result.outcome == "withdrawn"
    assert "quality" in str(world.channel.history)


def test_a_process_that_takes_over_goes_on_with_the_prompts() -> None:
    world = make_world()
    b = publish(world, "b")
    first = FakeProber(world, {})
    world.run(begin(world, b, first), until=lambda channel: len(first.seen) > 60)
    second = FakeProber(world, {}, epoch="two")
    assert world.run(begin(world, b, second)).outcome == "promoted"
    known = max(one.snapshot.probes.cursor for one in looks(world) if one.snapshot.probes)
    assert known >= len(first.seen)
    # What the last look of the first did not know yet is asked again; it was never counted.
    epochs = {one.snapshot.probes.epoch for one in looks(world) if one.snapshot.probes}
    assert epochs == {"one", "two"}
    pairs = sum(r.requests for r in log_of(world) if r.metric == "quality" and r.track == "stable")
    assert 0 < pairs <= len(SUMS)


def test_the_replay_says_what_the_looks_said() -> None:
    world = make_world()
    b = publish(world, "b")
    world.run(begin(world, b, FakeProber(world, {b: wrong_by(3)})))
    rollout = world.channel.rollout
    assert rollout is not None
    blocks, spec, _ = stored_log(world.store, MODEL, ENVIRONMENT, rollout.number)
    assert "quality" in [metric.name for metric in spec.metrics]
    said = [look.verdict for look in looks(world) if look.verdict is not None]
    by_time = {verdict.at: verdict for verdict in replay(blocks, spec)}
    assert [by_time[verdict.at] for verdict in said if verdict.at in by_time]
    assert all(by_time.get(verdict.at, verdict) == verdict for verdict in said)


def test_prompts_that_are_gone_stop_no_rollout_and_prove_nothing() -> None:
    world = make_world()
    b = publish(world, "b", rollout=SHORT)
    world.store.delete(f"evals/d1/{FILE}")
    assert world.run(begin(world, b, FakeProber(world, {}))).outcome == "withdrawn"


# --- over real sockets ----------------------------------------------------------------------------


@dataclass
class RealHost(FakeHost):
    """The world's servers, at addresses where somebody answers."""

    urls: dict[str, str] = field(default_factory=dict)

    def servers(self, environment: str, model: str) -> tuple[ServerStatus, ...]:
        found = super().servers(environment, model)
        return tuple(replace(server, url=self.urls[server.release_id]) for server in found)


@contextmanager
def answering(replies: Replies) -> Iterator[dict[str, str]]:
    """Run one server of completions a release; yield their URLs."""

    def reply(given: Callable[[str], str | None]) -> Callable[[dict[str, Any]], list[str] | int]:
        def answer(body: dict[str, Any]) -> list[str] | int:
            text = given(body["prompt"])
            return 500 if text is None else list(text)

        return answer

    with ExitStack() as stack:
        yield {
            name: stack.enter_context(completions(reply(given))) for name, given in replies.items()
        }


@pytest.mark.parametrize(
    ("reply", "outcome"), [(right, "promoted"), (wrong_by(2), "rolled_back")], ids=["good", "bad"]
)
def test_a_rollout_is_probed_over_http(reply: Callable[[str], str | None], outcome: str) -> None:
    world = make_world()
    a, b = release_id("a"), publish(world, "b", pairs_per_s=20)
    # The prober lives in the world's time, so it sends only what is due when time has passed.
    prober = HttpProber(monotonic=lambda: world.now.timestamp())
    with answering({a: right, b: reply}) as urls:
        tick = begin(world, b, prober, host=RealHost(world, urls))
        result = tick()
        for _ in range(4000):
            if result.done:
                break
            world.advance(min(max(result.next_in_s, 0.1), 0.25))
            _rest(world, prober)
            result = tick()
    assert isinstance(result, DriveResult)
    assert result.outcome == outcome
    quality = [row for row in log_of(world) if row.metric == "quality"]
    assert sum(row.requests for row in quality if row.track == "candidate") >= 60
    assert all(row.stratum == "probe" for row in quality)


def _rest(world: World, prober: HttpProber) -> None:
    """Give the prober's thread a moment, and wait until nothing is under way."""
    rollout = world.channel.rollout
    assert rollout is not None
    time.sleep(0.005)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        reading = prober.read(f"{MODEL}/{ENVIRONMENT}/{rollout.number}")
        if reading is None or all(one.sent == one.ended for one in reading.pods):
            return
        time.sleep(0.002)
    raise AssertionError("probes never came to their end")
