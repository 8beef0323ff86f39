"""Counters of what came of probes, in the form in which looks keep them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from trainyard.documents.look import Histogram, ProbeCounters
from trainyard.rollout.probes.answers import Answer
from trainyard.rollout.probes.schedule import Round

EDGES_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0,
)  # fmt: skip
"""Those of vLLM's times to the first token."""

Answers = Mapping[str, Answer | None]
"""By server; None: it failed."""


@dataclass
class _Times:
    count: int = 0
    total: float = 0.0
    buckets: list[int] = field(default_factory=lambda: [0] * len(EDGES_S))

    def add(self, seconds: float) -> None:
        self.count += 1
        self.total += seconds
        for index, edge in enumerate(EDGES_S):
            self.buckets[index] += seconds <= edge

    def histogram(self) -> Histogram:
        edges = {f"{edge:g}": count for edge, count in zip(EDGES_S, self.buckets, strict=True)}
        return Histogram(count=self.count, total=self.total, buckets={**edges, "+Inf": self.count})


@dataclass
class _Server:
    release_id: str
    sent: int = 0
    ended: int = 0
    answered: int = 0
    failed: int = 0
    pairs: int = 0
    worse: int = 0
    ttft: _Times = field(default_factory=_Times)
    tpot: _Times = field(default_factory=_Times)


class Tally:
    """Counts rounds. Nothing is counted before the whole round has ended, but for what was sent."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._servers: dict[str, _Server] = {}

    def sent(self, one: Round, releases: Mapping[str, str]) -> None:
        """Note that a round begins.

        Args:
            one: the round.
            releases: release ids by server.
        """
        for name in (*one.stable, *one.candidate):
            self._servers.setdefault(name, _Server(releases[name])).sent += 1

    def ended(
        self,
        one: Round,
        stable: Answers,
        candidate: Answers,
        verdict: tuple[bool, bool] | None,
    ) -> None:
        """Note what came of a round that was noted as sent.

        A request that failed counts if the other release answered the same prompt: what fails on
        both sides at once is the prompt's, the network's or the prober's fault.

        Args:
            one: the round.
            stable: the answers by server.
            candidate: the same.
            verdict: whether only stable's answer is wrong, and whether only the candidate's is;
                None: they were not compared.
        """
        for mine, theirs in ((stable, candidate), (candidate, stable)):
            other_answers = any(answer is not None for answer in theirs.values())
            for name, answer in mine.items():
                server = self._servers[name]
                server.ended += 1
                if answer is None:
                    server.failed += other_answers
                    continue
                server.answered += 1
                server.ttft.add(answer.ttft_s)
                if answer.tpot_s is not None:
                    server.tpot.add(answer.tpot_s)
        if verdict is not None:
            for name, worse in zip((one.stable[0], one.candidate[0]), verdict, strict=True):
                self._servers[name].pairs += 1
                self._servers[name].worse += worse

    def counters(self) -> tuple[ProbeCounters, ...]:
        """Return the counters of every server that was ever sent anything."""
        return tuple(
            ProbeCounters(
                pod=name,
                release_id=one.release_id,
                sent=one.sent,
                ended=one.ended,
                answered=one.answered,
                failed=one.failed,
                ttft=one.ttft.histogram(),
                tpot=one.tpot.histogram(),
                pairs=one.pairs,
                worse=one.worse,
            )
            for name, one in self._servers.items()
        )
