"""A release with everything that its report can show, made up but of one piece."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

from tests.unit.yard import MOMENT, measurement, spec

from trainyard.documents.measurement import (
    QUANTILES,
    Envelope,
    LevelFigures,
    Measurement,
    RateFound,
    RateProbe,
    StartFigures,
    TaskScore,
)
from trainyard.documents.plan import Price
from trainyard.documents.release import Pin, Release, Signature
from trainyard.gates.verdict import derive_verdict
from trainyard.reports.release import ReleaseReport, TargetLine, TokenCost
from trainyard.spec.model import Gates, ModelSpec

GATES: dict[str, Any] = {
    "accuracy": {
        "tasks": [
            {"name": "gsm8k_cot", "metric": "exact_match,strict-match", "min": 0.8},
            {"name": "ifeval", "metric": "prompt_level_strict_acc", "min": 0.7, "max_drop": 0.02},
        ]
    },
    "latency": {
        "slo": {"ttft_ms": 500, "tpot_ms": 40, "attainment": 0.95},
        "search": {"level": "chat", "bound": {"min": 10}},
        "levels": [
            {
                "name": "chat",
                "max_concurrency": 8,
                "num_prompts": 200,
                "input_len": 1024,
                "output_len": 256,
                "repeats": 3,
                "bounds": {"ttft_p99_ms": {"max": 480}, "tpot_p90_ms": {"max": 40}},
                "max_regression": {"ttft_p99_ms": 0.1, "output_tokens_per_s": 0.1},
            },
            {
                "name": "long-documents",
                "max_concurrency": 2,
                "num_prompts": 40,
                "input_len": 3000,
                "output_len": 64,
                "bounds": {"e2e_p99_ms": {"max": 9000, "severity": "warning"}},
            },
        ],
    },
    "cost": {"bounds": {"usd_per_million_output_tokens": {"max": 9}}},
}
PRICE = Price(instance="trn2.3xlarge", usd_per_hour=2.2, source="prices.yaml of 2026-11-01")


def figures(scale: float, rate: float) -> dict[str, float]:
    """Return figures of a load; `scale` is 1 for a server that is not busy."""
    found = {
        f"{name}_{mark}_ms": round(base * scale * factor, 1)
        for name, base in (("ttft", 150.0), ("tpot", 18.0), ("itl", 17.0), ("e2e", 4700.0))
        for mark, factor in (("p50", 1.0), ("p90", 1.6), ("p99", 2.9))
    }
    return found | {
        "input_tokens_per_s": round(1024 * rate, 1),
        "output_tokens_per_s": round(256 * rate, 1),
        "requests_per_s": rate,
        "good_requests_per_s": rate,
        "slo_attainment": 1.0,
        "failed_requests": 0.0,
    }


def level(name: str, scale: float, rate: float, **changes: Any) -> LevelFigures:
    found = figures(scale, rate)
    values: dict[str, Any] = {
        "name": name,
        "figures": found,
        "duration_s": 61.5,
        "completed": 200,
        "repeats": 3,
        "spread": {
            metric: (round(value * 0.93, 1), round(value * 1.12, 1))
            for metric, value in found.items()
            if metric.endswith("_ms")
        },
        "distributions": {
            f"{metric}_ms": tuple(
                round(base * scale * math.exp(0.5 * (share - 0.5) * 4 * abs(share - 0.5) * 2), 2)
                for share in QUANTILES
            )
            for metric, base in (("ttft", 150.0), ("tpot", 18.0), ("e2e", 4700.0))
        },
        "input_tokens": (700, 1024),
        "output_tokens": (256, 256),
        "peak_concurrency": 8,
        "max_concurrency": 8,
    }
    return LevelFigures(**{**values, **changes})


def search() -> RateFound:
    rates = (1.0, 2.0, 4.0, 8.0, 16.0, 11.31, 13.45, 12.33)
    probes = tuple(
        RateProbe(
            rate_per_s=rate,
            requests=240,
            completed=240,
            attainment=1.0 if rate <= 11.31 else round(0.9 - (rate - 12) / 8, 3),
            meets=rate <= 11.31,
            figures=figures(1 + (rate / 11) ** 4, rate),
            duration_s=31.0,
        )
        for rate in rates
    )
    return RateFound(
        level="chat",
        rate_per_s=11.31,
        failing_rate_per_s=12.33,
        complete=True,
        reason="12.33 a second does not meet the SLO any more.",
        probes=probes,
    )


def measured(measurement_id: str = "candidate", scale: float = 1.06, **changes: Any) -> Measurement:
    values: dict[str, Any] = {
        "latency": (
            level("chat", scale, 6.4),
            level("long-documents", 1.7 * scale, 0.9, repeats=1, spread={}),
        ),
        "accuracy": (
            TaskScore(
                name="gsm8k_cot",
                metric="exact_match,strict-match",
                score=0.842 * (2 - scale),
                stderr=0.0101,
                samples=1319,
            ),
            TaskScore(
                name="ifeval",
                metric="prompt_level_strict_acc",
                score=0.75,
                stderr=0.0186,
                samples=541,
            ),
        ),
        "start": StartFigures(ready_s=106.9, engine_init_s=61.0, new_cache_files=(), cold_s=497.0),
        "machine": {"processor": "Some CPU", "neuron_driver": "2.31.7.0", "load_1min": 0.4},
        "instance": "trn2.3xlarge",
        "search": search(),
        "envelope": Envelope(
            input_tokens=(700, 3000),
            output_tokens=(64, 256),
            max_concurrency=8,
            max_requests_per_s=6.4,
        ),
    }
    return measurement(measurement_id, **{**values, **changes})


def model_spec(**changes: Any) -> ModelSpec:
    return spec(**{"gates": GATES, "description": "Answers questions of our staff.", **changes})


def release(**changes: Any) -> Release:
    """Return a signed release; not one that a store would accept."""
    frozen = changes.pop("spec", None) or model_spec()
    values: dict[str, Any] = {
        "created_at": MOMENT,
        "release_id": "adder-0123456789ab",
        "model": "adder",
        "target": frozen.targets[0],
        "lane": "cpu",
        "checkpoint_key": "checkpoints/adder/v1/manifest.json",
        "checkpoint_digest": "c" * 64,
        "revision": "v1",
        "compile_key": "k" * 64,
        "bundle_digest": "b" * 64,
        "serving": {"max_num_seqs": 16},
        "serving_digest": "s" * 64,
        "served_model_name": "adder",
        "toolchain": {"vllm": "0.32.0"},
        "source": "file:models",
        "measurement_id": "candidate",
        "spec": frozen,
        "pins": (Pin(name="measurement", key="measurements/m1.json", sha256="a" * 64),),
        "signature": Signature(key_id="f00dfeed" * 8, scheme="ed25519", signer="yard crew"),
    }
    return Release(**{**values, **changes})


def parity() -> SimpleNamespace:
    """Return figures of the parity check, as far as the page shows them."""
    counts = [
        SimpleNamespace(compared=20, agreed=20 - index % 7, excused=min(index % 7, index % 3))
        for index in range(40)
    ]
    counts[1] = SimpleNamespace(compared=20, agreed=17, excused=2)
    return SimpleNamespace(
        compared=800, agreed=710, excused=40, first_divergence=1, by_position=counts
    )


def behaviour(said: str = "") -> SimpleNamespace:
    """Return findings of the behaviour checks, as far as the page shows them."""
    found = SimpleNamespace(sent=said or "stop=END", came=said or "END", expected=said or "nothing")
    return SimpleNamespace(
        records=[
            SimpleNamespace(
                name="stop_strings",
                capability=SimpleNamespace(ability="tolerance", why=said or "Rounding."),
                remark=said,
                count=lambda outcome: {"held": 3, "broken": 1}.get(outcome, 0),
                first=lambda outcome: found if outcome == "broken" else None,
            ),
            SimpleNamespace(
                name="streaming",
                capability=SimpleNamespace(ability="exact", why=""),
                remark="12 answers.",
                count=lambda outcome: 12 if outcome == "held" else 0,
                first=lambda outcome: None,
            ),
        ]
    )


def report(**changes: Any) -> ReleaseReport:
    """Return a report with everything in it."""
    candidate, stable = measured(), measured("stable", 1.0)
    gates = Gates.model_validate(GATES)
    verdicts = tuple(
        derive_verdict(
            gate,  # type: ignore[arg-type]
            gates,
            plan_id="adder-plan",
            target="cpu",
            measurement=candidate,
            baseline=stable,
            price=PRICE,
        ).verdict.model_copy(update={"created_at": MOMENT})
        for gate in ("accuracy", "latency")
    )
    values: dict[str, Any] = {
        "release": release(),
        "problem": "",
        "verdicts": verdicts,
        "measurement": candidate,
        "baseline": stable,
        "targets": (
            TargetLine(
                target="inf2",
                instance="inf2.48xlarge",
                release_id="",
                price=Price(instance="inf2.48xlarge", usd_per_hour=5.608, source="a table"),
                cost=TokenCost(1.9, 7.6, "8 requests a second", 2048.0),
            ),
            TargetLine(
                target="cpu",
                instance="trn2.3xlarge",
                release_id="adder-0123456789ab",
                price=PRICE,
                cost=TokenCost(0.0105, 0.0422, "11.31 requests a second", 2895.4),
            ),
            TargetLine(
                target="laptop",
                instance="local",
                release_id="",
                price=None,
                cost=None,
                why_none="Nobody said what an hour of local costs.",
            ),
        ),
        "parity": parity(),
        "behaviour": behaviour(),
    }
    return ReleaseReport(**{**values, **changes})
