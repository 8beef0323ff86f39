"""What tests of the behaviour checks share: which check is for which fault, and real weights."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from tests.tampering_proxy import Fault

from trainyard.documents.behaviour import Behaviour
from trainyard.lanes.capabilities import of_cpu
from trainyard.measure.behaviour.run import BehaviourJob, run_behaviour
from trainyard.spec.model import BehaviourName

CAUGHT_BY: Mapping[Fault, set[BehaviourName]] = {
    "batching": {"batching", "concurrency"},
    "prefix": {"prefix_cache"},
    "penalties": {"penalties"},
    "stop": {"stop_strings"},
    "stream": {"streaming", "stop_strings"},
    "too_long": {"longest_prompt"},
    "busy": {"concurrency"},
    "leak": {"cancellation"},
}
"""For each fault the checks that it breaks; no other one does."""


def check(
    url: str,
    model_dir: Path,
    names: Iterable[BehaviourName],
    max_model_len: int,
    *,
    requests: int = 4,
    seed: int = 0,
    prompts: Path | None = None,
) -> Behaviour:
    """Make these checks on a server of lane `cpu` that runs so many requests at once."""
    job = BehaviourJob(
        capabilities={name: of_cpu(name) for name in names},
        dtype="bfloat16",
        max_num_seqs=requests,
        block_size=32,
        prefix_caching=True,
        prompts=prompts.name if prompts else None,
        seed=seed,
    )
    return run_behaviour(
        job,
        base_url=url,
        served_model_name="adder",
        model_dir=model_dir,
        assets_dir=prompts.parent if prompts else model_dir,
        max_model_len=max_model_len,
    )


def false_stops(
    url: str,
    model_dir: Path,
    seeds: Iterable[int],
    names: Iterable[BehaviourName],
    max_model_len: int,
    *,
    requests: int = 4,
    prompts: Path | None = None,
) -> list[str]:
    """Return what checks of a faithful server found broken, with another seed each time."""
    return [
        f"seed {seed}, {record.name}: {case.sent}; {case.came}; {case.expected}"
        for seed in seeds
        for record in check(
            url, model_dir, names, max_model_len, requests=requests, seed=seed, prompts=prompts
        ).records
        for case in record.cases
        if case.outcome == "broken"
    ]


def make_sure(weights: Path, factor: int = 32) -> None:
    """Multiply the logits of a Llama, so that one that was hardly trained is sure of its answers.

    Its last norm is multiplied where it is stored, in bfloat16.
    """
    content = bytearray(weights.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    norm = json.loads(content[8 : 8 + length])["model.norm.weight"]
    assert norm["dtype"] == "BF16"
    start, end = (8 + length + offset for offset in norm["data_offsets"])
    halves = np.frombuffer(content[start:end], dtype="<u2")
    values = (halves.astype("<u4") << 16).view("<f4") * factor
    content[start:end] = (values.view("<u4") >> 16).astype("<u2").tobytes()
    weights.write_bytes(content)
