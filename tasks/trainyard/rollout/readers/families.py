"""Which series mean what, by the version of vLLM that serves.

Names change: a family is deprecated in 0.X, hidden in 0.X+1 and gone in 0.X+2. Where a release says
which vLLM it is served with, only the families of that version count; for other servers (adopted
ones) every family counts that is there. Of several, the first in the table wins.

Figures:

* `tpot` has one value a request: the time per output token after its first. It is what is judged.
* `finished` has a series for each reason why requests end. vLLM counts none whose client went away
  (seen with 0.32); `abort` and `error` are what the engine itself gave up.
* `outputs` says how many output tokens a request had. Its lowest edge is 1.
* `events` has one value an output event, of which a request has hundreds, and with speculative
  decoding an event holds several tokens. It serves only where one of two releases has no `tpot`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Figure = Literal[
    "ttft",
    "events",
    "tpot",
    "finished",
    "prompts",
    "outputs",
    "prefix_queries",
    "prefix_hits",
    "running",
    "waiting",
    "started",
]
Kind = Literal["histogram", "counter", "gauge"]
Version = tuple[int, int]


@dataclass(frozen=True)
class Family:
    """One family of series of a vLLM server."""

    figure: Figure
    """What it tells."""
    name: str
    """As Prometheus shows it; histograms without `_bucket`, `_count` and `_sum`."""
    kind: Kind
    since: Version = (0, 0)
    """The first version of vLLM that has it."""
    until: Version | None = None
    """The first version that has it no more. None: all newer ones have it."""
    with_buckets: bool = False
    """Does anybody need its buckets?"""

    @property
    def series(self) -> tuple[str, ...]:
        """The names of its samples that are needed."""
        if self.kind != "histogram":
            return (self.name,)
        ends = ("_count", "_sum", "_bucket") if self.with_buckets else ("_count", "_sum")
        return tuple(f"{self.name}{end}" for end in ends)

    def is_of(self, version: Version | None) -> bool:
        """Tell whether a version of vLLM has it; None stands for any."""
        if version is None:
            return True
        return self.since <= version and (self.until is None or version < self.until)


FAMILIES: tuple[Family, ...] = (
    Family("ttft", "vllm:time_to_first_token_seconds", "histogram", with_buckets=True),
    Family("tpot", "vllm:request_time_per_output_token_seconds", "histogram", since=(0, 11)),
    Family("events", "vllm:inter_token_latency_seconds", "histogram", since=(0, 11)),
    Family("events", "vllm:time_per_output_token_seconds", "histogram", until=(0, 13)),
    Family("finished", "vllm:request_success_total", "counter"),
    Family("prompts", "vllm:request_prompt_tokens", "histogram", with_buckets=True),
    Family("outputs", "vllm:request_generation_tokens", "histogram", with_buckets=True),
    Family("prefix_queries", "vllm:prefix_cache_queries_total", "counter", since=(0, 10)),
    Family("prefix_queries", "vllm:gpu_prefix_cache_queries_total", "counter", until=(0, 12)),
    Family("prefix_hits", "vllm:prefix_cache_hits_total", "counter", since=(0, 10)),
    Family("prefix_hits", "vllm:gpu_prefix_cache_hits_total", "counter", until=(0, 12)),
    Family("running", "vllm:num_requests_running", "gauge"),
    Family("waiting", "vllm:num_requests_waiting", "gauge"),
    Family("started", "process_start_time_seconds", "gauge"),
)


def families(version: str | None) -> tuple[Family, ...]:
    """Return the families of a version of vLLM, the better ones of each figure first.

    Args:
        version: such as `0.11.0` or `0.13.1+neuron`. None, or a text without two numbers: all.
    """
    known = _parse(version)
    return tuple(family for family in FAMILIES if family.is_of(known))


def series_names(chosen: Sequence[Family] = FAMILIES) -> tuple[str, ...]:
    """Return the names of all samples that the families need, without repeats."""
    return tuple(dict.fromkeys(name for family in chosen for name in family.series))


def _parse(version: str | None) -> Version | None:
    found = re.match(r"v?(\d+)\.(\d+)", version or "")
    return (int(found[1]), int(found[2])) if found else None
