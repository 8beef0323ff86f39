"""Load levels become runs of vLLM's benchmark, and its results our figures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import pytest

from trainyard.documents.measurement import LevelFigures
from trainyard.measure.latency import (
    Load,
    Server,
    arguments,
    chosen_prompts,
    combine,
    probe_of,
)
from trainyard.spec.model import Bound, LatencyMetric, LoadLevel, Slo

SERVER = Server("http://127.0.0.1:8000", "adder", Path("/models/adder"), Path("/assets"))
SLO = Slo(ttft_ms=200, tpot_ms=25.5, attainment=0.9)


def level(**changes: Any) -> LoadLevel:
    values: dict[str, Any] = {
        "name": "busy",
        "max_concurrency": 4,
        "num_prompts": 40,
        "input_len": 16,
        "output_len": 64,
        "bounds": {"failed_requests": Bound(max=0)},
    }
    return LoadLevel(**{**values, **changes})


def result(**changes: Any) -> dict[str, Any]:
    """Return a result as the benchmark gives it."""
    values: dict[str, Any] = {
        "duration": 1.5,
        "completed": 40,
        "failed": 0,
        "total_input_tokens": 640,
        "output_throughput": 1700.0,
        "request_throughput": 26.5,
        "request_goodput": 24.0,
    }
    for number, name in enumerate(("ttft", "tpot", "itl", "e2el"), start=1):
        values |= {f"p{percent}_{name}_ms": number * 100.0 + percent for percent in (50, 90, 99)}
    return {**values, **changes}


def combined(*results: dict[str, Any], **changes: Any) -> LevelFigures:
    return combine(level(**changes), results)


def words(slo: Slo | None = None, number: int = 0, **changes: Any) -> list[str]:
    return arguments(Load.repeat(level(**changes), number), SERVER, slo)


def test_every_figure_of_a_spec_is_measured() -> None:
    assert set(combined(result()).figures) == set(get_args(LatencyMetric))


def test_figures_have_our_names() -> None:
    found = combined(result())
    assert found.figures["ttft_p99_ms"] == 199.0
    assert found.figures["tpot_p50_ms"] == 250.0
    assert found.figures["itl_p99_ms"] == 399.0
    assert found.figures["e2e_p50_ms"] == 450.0
    assert found.figures["output_tokens_per_s"] == 1700.0
    assert found.figures["failed_requests"] == 0.0
    assert (found.name, found.duration_s, found.completed) == ("busy", 1.5, 40)


def test_goodput_becomes_a_share_of_all_requests_failed_ones_included() -> None:
    # 24 good requests a second for 1.5 s are 36 of 40.
    found = combined(result(completed=38, failed=2)).figures

    assert found["slo_attainment"] == 0.9
    assert found["good_requests_per_s"] == 24.0
    assert found["input_tokens_per_s"] == pytest.approx(640 / 1.5)


def test_without_an_slo_there_are_no_figures_of_it() -> None:
    found = combined(result(request_goodput=None)).figures

    assert not {"good_requests_per_s", "slo_attainment"} & set(found)


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_a_figure_without_a_value_is_left_out(value: float | None) -> None:
    found = combined(result(p99_tpot_ms=value))
    assert "tpot_p99_ms" not in found.figures
    assert "tpot_p90_ms" in found.figures


def test_without_a_completed_request_only_failures_are_told() -> None:
    found = combined(result(completed=0, failed=40, p50_ttft_ms=0.0))
    assert found.figures == {"failed_requests": 40.0}


def test_repeats_give_medians_and_their_range() -> None:
    runs = [result(p99_ttft_ms=value) for value in (210.0, 190.0, 250.0)]

    found = combined(*runs)

    assert found.figures["ttft_p99_ms"] == 210.0
    assert found.spread["ttft_p99_ms"] == (190.0, 250.0)
    assert found.spread["requests_per_s"] == (26.5, 26.5)
    assert (found.repeats, found.duration_s) == (3, 4.5)


def test_a_single_run_has_no_spread() -> None:
    assert combined(result()).spread == {}


def test_the_worst_repeat_tells_what_failed() -> None:
    found = combined(result(), result(completed=37, failed=3), result())

    assert found.figures["failed_requests"] == 3.0
    assert found.completed == 37


def test_a_figure_that_one_repeat_lacks_is_missing() -> None:
    found = combined(result(), result(p99_tpot_ms=math.nan))

    assert "tpot_p99_ms" not in found.figures
    assert "tpot_p99_ms" not in found.spread
    assert combined(result(), result(completed=0)).figures == {"failed_requests": 40.0}


def detailed() -> dict[str, Any]:
    """Return a result with three answered requests and one that failed."""
    return result(
        ttfts=[0.1, 0.2, 0.3, 0.0],
        latencies=[0.5, 1.0, 0.3, 0.01],
        input_lens=[16, 12, 20, 15],
        output_lens=[5, 9, 1, 0],
        errors=["", "", "", "Traceback (…)\nTimeoutError: too slow"],
        start_times=[10.0, 10.2, 10.5, 11.0],
    )


def test_single_requests_give_distributions_and_the_envelope() -> None:
    found = combined(detailed())

    ttft = found.distributions["ttft_ms"]
    assert (ttft[0], ttft[10], ttft[-1]) == (100.0, 200.0, 300.0)
    # An answer of one token has no time per token after the first.
    assert found.distributions["tpot_ms"] == (100.0,) * 21
    assert found.distributions["e2e_ms"][-1] == 1000.0
    assert (found.input_tokens, found.output_tokens) == ((12, 20), (1, 9))
    # The third begins as the first ends.
    assert found.peak_concurrency == 2
    assert found.errors == ("TimeoutError: too slow",)


def test_a_result_without_single_requests_has_no_distributions() -> None:
    found = combined(result())

    assert found.distributions == {}
    assert (found.input_tokens, found.errors) == (None, ())


def test_a_level_becomes_the_benchmarks_command_line() -> None:
    found = words()
    for word in (
        "--base-url=http://127.0.0.1:8000",
        "--model=adder",
        "--tokenizer=/models/adder",
        "--random-input-len=16",
        "--random-output-len=64",
        "--num-prompts=40",
        "--max-concurrency=4",
        "--num-warmups=4",
        "--ignore-eos",
    ):
        assert word in found
    for absent in ("--request-rate", "--random-range-ratio", "--goodput"):
        assert not any(word.startswith(absent) for word in found)
    assert "--request-rate=2.5" in words(request_rate=2.5)


def test_a_level_may_be_given_by_its_rate_alone() -> None:
    found = words(max_concurrency=None, request_rate=8, warm_up_requests=0)

    assert not any(word.startswith("--max-concurrency") for word in found)
    assert "--num-warmups=0" in found
    assert "--num-warmups=2" in words(max_concurrency=None, request_rate=8)


def test_lengths_may_vary() -> None:
    found = words(input_range=0.5, output_range=0.25)

    assert '--random-range-ratio={"input": 0.5, "output": 0.25}' in found


def test_an_slo_is_told_to_the_benchmark() -> None:
    found = words(SLO)

    start = found.index("--goodput")
    assert found[start : start + 3] == ["--goodput", "ttft:200.0", "tpot:25.5"]


def test_real_prompts_come_from_a_file_and_say_how_long_answers_are() -> None:
    real = level(input_len=None, output_len=None, prompts="adder/load.jsonl")
    load = Load(real, 40, None, 4, prompts=Path("/data/prompts.jsonl"))

    found = arguments(load, SERVER)

    assert "--dataset-path=/data/prompts.jsonl" in found
    assert {"--dataset-name=custom", "--custom-output-len=-1"} <= set(found)


def test_each_run_goes_on_in_the_file_where_the_last_one_ended() -> None:
    lines = ["a", "b", "c", "d", "e"]

    runs = [chosen_prompts(lines, requests=2, number=number) for number in range(4)]

    assert runs == [["a", "b"], ["c", "d"], ["e", "a"], ["b", "c"]]
    assert chosen_prompts(["a"], requests=3, number=1) == ["a", "a", "a"]


def test_prompts_are_the_same_for_every_release_and_differ_between_levels_and_repeats() -> None:
    def seed(name: str, number: int = 0) -> str:
        (found,) = [word for word in words(number=number, name=name) if word[:7] == "--seed="]
        return found

    assert seed("busy") == seed("busy")
    assert len({seed("busy"), seed("one"), seed("busy", 1), seed("busy", 2)}) == 4


def test_a_probe_holds_nothing_back_and_is_long_enough_to_say_something() -> None:
    load = Load.probe(level(repeats=3), 10.0, 30.0, 1)

    assert (load.requests, load.request_rate, load.max_concurrency) == (300, 10.0, None)
    assert Load.probe(level(), 0.1, 30.0, 0).requests == 20
    assert load.seed not in {Load.repeat(level(), number).seed for number in range(3)}


@pytest.mark.parametrize(("good_per_s", "meets"), [(24.0, True), (23.0, False), (None, False)])
def test_a_rate_meets_the_slo_if_enough_requests_do(good_per_s: float | None, meets: bool) -> None:
    load = Load.probe(level(), 4.0, 10.0, 0)

    found = probe_of(load, result(request_goodput=good_per_s), SLO)

    assert (found.rate_per_s, found.requests, found.meets) == (4.0, 40, meets)


def test_a_probe_says_how_many_requests_were_in_flight() -> None:
    each = result(start_times=[0.0, 1.0, 2.0], latencies=[1.5, 1.5, 0.5])

    assert probe_of(Load.probe(level(), 4.0, 10.0, 0), each, SLO).peak_concurrency == 2


def test_a_rate_at_which_nothing_is_answered_does_not_meet_the_slo() -> None:
    found = probe_of(Load.probe(level(), 4.0, 10.0, 0), result(completed=0, failed=40), SLO)

    assert (found.attainment, found.meets) == (0.0, False)
