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


def give_random_head(weights: Path) -> None:
    """Replace the last matrix of the demonstration model, so that it is sure of what it says.

    One that was hardly trained says the end of text, whatever it is asked. With this one the next
    token follows from the one before, and never is a special one.
    """
    content = bytearray(weights.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    head = json.loads(content[8 : 8 + length])["lm_head.weight"]
    assert head["dtype"] == "BF16"
    start, end = (8 + length + offset for offset in head["data_offsets"])
    values = np.random.default_rng(20261127).normal(0, 0.5, head["shape"]).astype("<f4")
    values[:2] = 0.0
    content[start:end] = (values.view("<u4") >> 16).astype("<u2").tobytes()
    weights.write_bytes(content)
