"""Latency through vLLM's own serving benchmark, against the server's own HTTP interface."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainyard.documents.measurement import QUANTILES, LevelFigures, RateProbe
from trainyard.errors import Refused
from trainyard.spec.model import LoadLevel, Slo

_FIGURES = {
    "ttft_p50_ms": "p50_ttft_ms",
    "ttft_p90_ms": "p90_ttft_ms",
    "ttft_p99_ms": "p99_ttft_ms",
    "tpot_p50_ms": "p50_tpot_ms",
    "tpot_p90_ms": "p90_tpot_ms",
    "tpot_p99_ms": "p99_tpot_ms",
    "itl_p50_ms": "p50_itl_ms",
    "itl_p90_ms": "p90_itl_ms",
    "itl_p99_ms": "p99_itl_ms",
    "e2e_p50_ms": "p50_e2el_ms",
    "e2e_p90_ms": "p90_e2el_ms",
    "e2e_p99_ms": "p99_e2el_ms",
    "output_tokens_per_s": "output_throughput",
    "requests_per_s": "request_throughput",
    "good_requests_per_s": "request_goodput",
    "failed_requests": "failed",
}
"""Our names (`trainyard.spec.model.LatencyMetric`) and the benchmark's."""

MIN_PROBE_REQUESTS = 20
"""Fewer requests say little about a share of them."""
_WARM_UPS = 2
_SHOWN_ERRORS = 3
_ERROR_LENGTH = 200


@dataclass(frozen=True)
class Server:
    """What is measured."""

    base_url: str
    served_model_name: str
    model_dir: Path
    """Where the tokenizer is."""
    assets_dir: Path
    """The files of the spec, for levels with real prompts."""


@dataclass(frozen=True)
class Load:
    """One run of the benchmark."""

    level: LoadLevel
    """Whose prompts and answers are used."""
    requests: int
    request_rate: float | None
    max_concurrency: int | None
    number: int = 0
    """Which repeat or probe it is: no two of a level have the same prompts."""
    prompts: Path | None = None
    """File with exactly these requests' prompts; None: random ones."""

    @classmethod
    def repeat(cls, level: LoadLevel, number: int) -> Load:
        """Return the load of one repeat of `level`."""
        return cls(level, level.num_prompts, level.request_rate, level.max_concurrency, number)

    @classmethod
    def probe(cls, level: LoadLevel, rate: float, probe_s: float, number: int) -> Load:
        """Return the load that tries a rate: what comes is not held back."""
        requests = max(MIN_PROBE_REQUESTS, math.ceil(rate * probe_s))
        return cls(level, requests, rate, None, level.repeats + number)

    @property
    def warm_ups(self) -> int:
        """Requests before it that count for nothing."""
        if self.level.warm_up_requests is not None:
            return self.level.warm_up_requests
        return max(_WARM_UPS, self.max_concurrency or 0)

    @property
    def seed(self) -> int:
        """Of the prompts: the same for every release, another for each level and repeat.

        So no load finds the prompts of another one in the prefix cache.
        """
        name = self.level.name
        return zlib.crc32((name if self.number == 0 else f"{name}/{self.number}").encode())


def arguments(load: Load, server: Server, slo: Slo | None = None) -> list[str]:
    """Return the benchmark's command line for `load`.

    Answers run to their full length, whatever the model says.
    """
    words = [
        "--backend=openai",
        "--endpoint=/v1/completions",
        f"--base-url={server.base_url}",
        f"--model={server.served_model_name}",
        f"--tokenizer={server.model_dir}",
        *_dataset(load),
        f"--num-prompts={load.requests}",
        f"--num-warmups={load.warm_ups}",
        f"--seed={load.seed}",
        "--ignore-eos",
        "--temperature=0",
        "--percentile-metrics=ttft,tpot,itl,e2el",
        "--metric-percentiles=50,90,99",
        # Nothing is saved by it; it keeps the figures of single requests in its result.
        "--save-detailed",
        "--disable-tqdm",
    ]
    if load.max_concurrency is not None:
        words.append(f"--max-concurrency={load.max_concurrency}")
    if load.request_rate is not None:
        words.append(f"--request-rate={load.request_rate}")
    if slo is not None:
        limits = {"ttft": slo.ttft_ms, "tpot": slo.tpot_ms, "e2el": slo.e2e_ms}
        words.append("--goodput")
        words += [f"{name}:{limit}" for name, limit in limits.items() if limit is not None]
    return words


def _dataset(load: Load) -> list[str]:
    level = load.level
    if load.prompts is not None:
        # -1: each prompt says how long its answer is.
        length = -1 if level.output_len is None else level.output_len
        return [
            "--dataset-name=custom",
            f"--dataset-path={load.prompts}",
            f"--custom-output-len={length}",
            "--disable-shuffle",
            "--skip-chat-template",
        ]
    words = [
        "--dataset-name=random",
        f"--random-input-len={level.input_len}",
        f"--random-output-len={level.output_len}",
    ]
    if level.input_range or level.output_range:
        ranges = {"input": level.input_range, "output": level.output_range}
        words.append(f"--random-range-ratio={json.dumps(ranges)}")
    return words


def run_level(level: LoadLevel, server: Server, slo: Slo | None = None) -> LevelFigures:
    """Put one load on a server, as often as it says, and return the figures.

    Raises:
        Refused: the benchmark failed. Requests that fail are a figure, not an error.
    """
    loads = [Load.repeat(level, number) for number in range(level.repeats)]
    return combine(level, [_run(load, server, slo) for load in loads])


def run_probe(load: Load, server: Server, slo: Slo) -> RateProbe:
    """Try one rate. Raises Refused if the benchmark fails."""
    return probe_of(load, _run(load, server, slo), slo)


def _run(load: Load, server: Server, slo: Slo | None) -> Mapping[str, Any]:
    """Run the benchmark and return its result."""
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    try:
        if load.level.prompts is not None:
            load = replace(load, prompts=_write_prompts(load, server.assets_dir))
        result: Mapping[str, Any] = main(parser.parse_args(arguments(load, server, slo)))
    # Its parser exits where an older vLLM does not know an argument.
    except (Exception, SystemExit) as error:
        raise Refused(
            f"The benchmark failed at load level {load.level.name}: {type(error).__name__}: "
            f"{error}",
            hint="The log of the measurement has the details.",
        ) from error
    return result


def _write_prompts(load: Load, assets_dir: Path) -> Path:
    """Write the real prompts of one run into the working folder and return the file."""
    text = (assets_dir / str(load.level.prompts)).read_text(encoding="utf-8")
    chosen = chosen_prompts(text.splitlines(), requests=load.requests, number=load.number)
    path = Path(f"prompts-{load.level.name}-{load.number}.jsonl").absolute()
    path.write_text("".join(f"{line}\n" for line in chosen), encoding="utf-8")
    return path


def chosen_prompts(lines: Sequence[str], *, requests: int, number: int) -> list[str]:
    """Return the prompts of one run: each run goes on where the one before it ended.

    A file that is too short begins again, so that a prefix cache may know its prompts by then.
    """
    start = requests * number % len(lines)
    return list(itertools.islice(itertools.cycle(lines), start, start + requests))


def combine(level: LoadLevel, results: Sequence[Mapping[str, Any]]) -> LevelFigures:
    """Return the repeats' results under our names.

    A figure that lacks a finite value in any repeat is left out. Where a repeat completed nothing,
    only its failures are told.
    """
    each = [figures_of(result, level.num_prompts) for result in results]
    common = set.intersection(*(set(figures) for figures in each))
    figures = {name: statistics.median(one[name] for one in each) for name in common}
    failed = max(one["failed_requests"] for one in each)
    spread = {
        name: (min(one[name] for one in each), max(one[name] for one in each)) for name in common
    }
    requests = [request for result in results for request in _requests(result)]
    return LevelFigures(
        name=level.name,
        figures={**figures, "failed_requests": failed},
        duration_s=sum(float(result["duration"]) for result in results),
        completed=min(int(result["completed"]) for result in results),
        repeats=len(results),
        spread=dict(sorted(spread.items())) if len(results) > 1 else {},
        distributions=_distributions(requests),
        input_tokens=_range(request.input_tokens for request in requests),
        output_tokens=_range(request.output_tokens for request in requests),
        peak_concurrency=_peak(results),
        request_rate=level.request_rate,
        max_concurrency=level.max_concurrency,
        errors=_errors(results),
    )


def figures_of(result: Mapping[str, Any], requests: int) -> dict[str, float]:
    """Return one result's figures under our names; one without a finite value is left out."""
    failed = float(result.get("failed", requests - result["completed"]))
    if not result["completed"]:
        # The benchmark reports zeros then.
        return {"failed_requests": float(requests)}
    figures = {
        ours: float(result[theirs])
        for ours, theirs in _FIGURES.items()
        if isinstance(result.get(theirs), int | float) and math.isfinite(result[theirs])
    }
    duration, prompt_tokens = result.get("duration"), result.get("total_input_tokens")
    if duration and prompt_tokens is not None:
        figures["input_tokens_per_s"] = prompt_tokens / duration
    if duration and "good_requests_per_s" in figures:
        good = figures["good_requests_per_s"] * duration / requests
        figures["slo_attainment"] = round(min(1.0, good), 6)
    return {**figures, "failed_requests": failed}


def probe_of(load: Load, result: Mapping[str, Any], slo: Slo) -> RateProbe:
    """Return what the benchmark's result says about a rate."""
    figures = figures_of(result, load.requests)
    attainment = figures.get("slo_attainment", 0.0)
    return RateProbe(
        rate_per_s=load.request_rate or 0.0,
        requests=load.requests,
        completed=int(result["completed"]),
        attainment=attainment,
        meets=attainment >= slo.attainment,
        figures=figures,
        duration_s=float(result["duration"]),
        peak_concurrency=_peak([result]),
    )


@dataclass(frozen=True)
class _Request:
    """One request that was answered."""

    ttft_s: float
    e2e_s: float
    input_tokens: int
    output_tokens: int


def _requests(result: Mapping[str, Any]) -> list[_Request]:
    """Return the answered requests of a result that has them one by one."""
    columns = [result.get(name) for name in ("ttfts", "latencies", "input_lens", "output_lens")]
    errors = result.get("errors")
    if errors is None or any(column is None for column in columns):
        return []
    rows = zip(errors, *(column or () for column in columns), strict=True)
    return [
        _Request(float(ttft), float(e2e), int(prompt), int(answer))
        for error, ttft, e2e, prompt, answer in rows
        if not error and answer
    ]


def _distributions(requests: Sequence[_Request]) -> dict[str, tuple[float, ...]]:
    several = [request for request in requests if request.output_tokens > 1]
    values = {
        "ttft_ms": [request.ttft_s for request in requests],
        "tpot_ms": [(each.e2e_s - each.ttft_s) / (each.output_tokens - 1) for each in several],
        "e2e_ms": [request.e2e_s for request in requests],
    }
    return {name: _quantiles(found) for name, found in values.items() if found}


def _quantiles(seconds: Sequence[float]) -> tuple[float, ...]:
    """Return the values at each of `QUANTILES`, in milliseconds, as numpy's default does it."""
    ordered = sorted(seconds)
    found = []
    for share in QUANTILES:
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        value = ordered[low] + (ordered[high] - ordered[low]) * (place - low)
        found.append(round(value * 1000, 3))
    return tuple(found)


def _range(values: Iterable[int]) -> tuple[int, int] | None:
    found = list(values)
    return (min(found), max(found)) if found else None


def _peak(results: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the most requests of a run that were in flight at one moment.

    From when each began and how long it took: the benchmark's own figure counts all requests of a
    second together.
    """
    peaks = []
    for result in results:
        begins, lasts = result.get("start_times"), result.get("latencies")
        if begins and lasts:
            changes = [(begin, 1) for begin in begins]
            changes += [(begin + last, -1) for begin, last in zip(begins, lasts, strict=True)]
            # Of what happens at the same moment, ends come first.
            peaks.append(max(itertools.accumulate(step for _, step in sorted(changes))))
    return max(peaks, default=None)


def _errors(results: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    said = (error for result in results for error in result.get("errors") or () if error)
    lines = (str(error).strip().splitlines()[-1:] for error in said)
    texts = dict.fromkeys(line[0][:_ERROR_LENGTH] for line in lines if line)
    return tuple(itertools.islice(texts, _SHOWN_ERRORS))
